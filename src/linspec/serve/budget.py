"""What a served model needs of the memory, said before the first request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from linspec.engine.engine import Engine
from linspec.engine.loops.hypotheses import HypothesisLoop
from linspec.models.memory import weight_bytes
from linspec.serve.endpoints.about import longest
from linspec.serve.worker import Worker
from linspec.state.kv_cache import KVCache
from linspec.state.sequence_states import SequenceStates
from linspec.utils.ram import available_bytes, process_bytes

# tokens of a sequence for the budget of a model without a limit
_USUAL = 8192
# how deep in a drafter or a loop a state may lie
_DEPTH = 4
# longer lists are no lists of drafters
_DRAFTERS = 16


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of a model and of its sequences.

    Attributes:
        length: tokens of the longest sequence.
        state: bytes of one such sequence, without copies; kv: those of them that are in caches that grow.
        copies: how many a sequence has beside it, such as hypotheses of beams and branches of drafts.
        drafters: bytes of their weights; drafts: of their own states, of all slots together.
        prefixes: most bytes of states of earlier texts.
        process: what this process has taken before the first request.
        available: what there is for states, by the settings or by what the machine has left; None if it does
            not say.
    """

    slots: int
    queue: int
    length: int
    state: int
    kv: int
    copies: int
    weights: int
    drafters: int
    drafts: int
    prefixes: int
    process: int
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
            copies=engine.loop.copies,
            weights=weight_bytes(worker.llm.model),
            drafters=_drafter_bytes(engine.drafter),
            drafts=sum(each.slots * each.bytes_at(length) for each in _other_states(engine)),
            prefixes=engine.prefix_cache.options.bytes if engine.prefix_cache else 0,
            process=process_bytes(),
            available=available_bytes() if limit is None else limit,
        )

    @property
    def sequence(self) -> int:
        """Bytes of the longest sequence, with its copies."""
        return (1 + self.copies) * self.state

    @property
    def concurrency(self) -> int:
        """Longest sequences that fit at once."""
        if self.available is None or not self.state:
            return self.slots
        return max(0, min(self.slots, self.available // self.sequence))

    @property
    def most(self) -> int:
        """Bytes of this process when all slots and the prefix cache are full, but for what a step needs."""
        states = self.slots * self.sequence
        if self.available is not None:
            states = min(states, self.available)
        return self.process + states + self.drafts + self.prefixes

    def text(self) -> str:
        """For people."""
        copies = f" with {self.copies} copies" if self.copies else ""
        caches = self.slots * (1 + self.copies) * self.kv
        said = (
            f"weights {_size(self.weights)}, drafters {_size(self.drafters + self.drafts)}, prefix cache up "
            f"to {_size(self.prefixes)}; {self.slots} slots of {_size(self.sequence)} at {self.length:,} "
            f"tokens{copies} are {_size(self.slots * self.sequence)} (KV caches {_size(caches)}); "
            f"{self.concurrency} such sequences at once, {self.queue} wait; the process has "
            f"{_size(self.process)}, with all of this {_size(self.most)}"
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


def _other_states(engine: Engine) -> list[SequenceStates]:
    """The states that a drafter and a loop keep beside that of the engine, such as those of a draft model."""
    loop, found = engine.loop, list[SequenceStates]()
    # hypotheses of the model itself are copies of a sequence
    beams = [loop.beams] if isinstance(loop, HypothesisLoop) else []
    seen = {id(each) for each in (engine.state, engine.model, *beams)}
    left: list[tuple[Any, int]] = [(each, 0) for each in (engine.drafter, loop)]
    while left:
        each, depth = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, SequenceStates):
            found.append(each)
        elif depth < _DEPTH and not isinstance(each, nn.Module):
            left += [(part, depth + 1) for part in _parts(each)]
    return found


def _parts(of: Any) -> list[Any]:
    """What an object is made of, or a short collection of them."""
    if isinstance(of, tuple | list):
        return list(of) if len(of) <= _DRAFTERS else []
    names = (*getattr(of, "__slots__", ()), *getattr(of, "__dict__", ()))
    return [getattr(of, name, None) for name in names if isinstance(name, str)]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
