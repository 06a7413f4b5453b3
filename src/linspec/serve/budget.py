"""What a served model needs of the memory, said before the first request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from linspec.drafters.auto import weight_bytes
from linspec.serve.endpoints.about import longest
from linspec.serve.worker import Worker
from linspec.state.kv_cache import KVCache
from linspec.utils.ram import available_bytes

# tokens of a sequence for the budget of a model without a limit
_USUAL = 8192


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of a model and of its sequences.

    length: tokens of the longest sequence. state: bytes of one such sequence; kv: those of them that are in
    caches that grow. prefixes: most bytes of states of earlier texts. available: what there is for states, by
    the settings or by what the machine has left; None if it does not say.
    """

    slots: int
    queue: int
    length: int
    state: int
    kv: int
    weights: int
    drafters: int
    prefixes: int
    available: int | None

    @classmethod
    def of(cls, worker: Worker, limit: int | None = None) -> MemoryBudget:
        """The budget of a worker's model; limit: most bytes of states."""
        engine = worker.llm.engine
        length = longest(worker.llm) or _USUAL
        growing = [part for part in engine.state.parts if isinstance(part, KVCache)]
        return cls(
            slots=worker.slots,
            queue=worker.queue_limit,
            length=length,
            state=engine.state.bytes_at(length),
            kv=sum(part.bytes_at(length) for part in growing),
            weights=weight_bytes(worker.llm.model),
            drafters=_drafter_bytes(engine.drafter),
            prefixes=engine.prefix_cache.options.bytes if engine.prefix_cache else 0,
            available=available_bytes() if limit is None else limit,
        )

    @property
    def concurrency(self) -> int:
        """Longest sequences that fit at once."""
        if self.available is None or not self.state:
            return self.slots
        return max(0, min(self.slots, self.available // self.state))

    def text(self) -> str:
        """For people."""
        total = self.slots * self.state
        said = (
            f"weights {_size(self.weights)}, drafters {_size(self.drafters)}, prefix cache up to "
            f"{_size(self.prefixes)}; {self.slots} slots of {_size(self.state)} at {self.length:,} tokens "
            f"are {_size(total)} (KV caches {_size(self.slots * self.kv)}); {self.concurrency} such "
            f"sequences at once, {self.queue} wait"
        )
        if self.concurrency < self.slots:
            said += f"; {_size(self.available or 0)} are there for states"
        return said


def _drafter_bytes(drafter: Any) -> int:
    """Weights that a drafter or its parts hold."""
    if drafter is None:
        return 0
    parts = [drafter, *(getattr(drafter, "drafters", None) or ())]
    held = {id(each): each for part in parts for each in vars(part).values()}
    return sum(weight_bytes(each) for each in held.values() if isinstance(each, nn.Module))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
