"""Live figures of a server, second by second: load, queue, memory, tokens, tokens per round.

    loads = Loads()
    worker.observe(loads.watch("smollm2", worker))
    loads.snapshot()                         # JSON types

A second is entered when a step begins in it; seconds without steps are idle ones.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from linspec.drafters.base import name_of
from linspec.errors import LinspecError
from linspec.serve.metrics import state_bytes
from linspec.utils.ram import available_bytes, process_bytes

if TYPE_CHECKING:
    from linspec.serve.worker import Job, Stepped, Worker

# seconds that are kept
KEPT = 120


@dataclass(slots=True)
class Second:
    """What happened in one second; running and waiting are the most at once.

    busy: the share of the second that steps took.
    """

    running: int = 0
    waiting: int = 0
    busy: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    state_bytes: int = 0
    process_bytes: int = 0


class Loads:
    """The figures of one server. `clock` returns seconds since any moment."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = clock()
        self.models: dict[str, ModelLoad] = {}

    def watch(self, model: str, worker: Worker) -> ModelLoad:
        """The observer of a worker, whose model is called `model`."""
        self.models[model] = ModelLoad(worker, self.clock)
        return self.models[model]

    def snapshot(self, seconds: int = KEPT) -> dict[str, Any]:
        """The last whole `seconds` of every model, the oldest first, and what is so now."""
        end = int(self.clock())
        return self._between(end - seconds, end)

    async def follow(self, every: float = 1.0) -> AsyncIterator[dict[str, Any]]:
        """A snapshot of all that is kept, then what has become of each second since.

        It ends with the workers: nobody who follows keeps a server from its end.
        """
        begin, end = int(self.clock()) - KEPT, int(self.clock())
        while any(load.worker.ready for load in self.models.values()):
            yield self._between(begin, end)
            await asyncio.sleep(every)
            begin, end = max(end, int(self.clock()) - KEPT), int(self.clock())

    def _between(self, begin: int, end: int) -> dict[str, Any]:
        models = {name: load.snapshot(range(begin, end)) for name, load in self.models.items()}
        return {
            "uptime_s": self.clock() - self.began,
            "process_bytes": process_bytes(),
            "available_bytes": available_bytes(),
            "models": models,
        }


class ModelLoad:
    """The observer of one worker; see `Observer`."""

    def __init__(self, worker: Worker, clock: Callable[[], float]) -> None:
        self.worker, self.clock = worker, clock
        self._seconds: OrderedDict[int, Second] = OrderedDict()
        self._chat = _has_template(worker)
        drafter = worker.llm.engine.drafter
        self._drafter = "none" if drafter is None else name_of(drafter)

    def queued(self, job: Job) -> None:
        """A queue is seen also where no step ends."""
        now = self._now()
        now.waiting = max(now.waiting, self.worker.waiting)

    def started(self, job: Job) -> None:
        """Steps say who runs."""

    def ended(self, job: Job) -> None:
        """Steps say who runs."""

    def stepped(self, step: Stepped) -> None:
        """Add a step to its second."""
        now = self._now()
        now.running = max(now.running, step.running)
        now.waiting = max(now.waiting, step.waiting)
        now.busy += step.seconds
        for _, outcome in step.outcomes:
            count = len(outcome.tokens)
            if not count:
                continue
            now.tokens += count
            now.rounds += 1
            if outcome.sequence.emitted <= count:
                now.prompt_tokens += outcome.sequence.prompt_tokens
            if outcome.tree is not None:
                now.drafted += len(outcome.tree) - 1
                now.accepted[outcome.drafter] += outcome.drafted

    def _now(self) -> Second:
        at = int(self.clock())
        if at not in self._seconds:
            # once a second: counting bytes is not free
            self._seconds[at] = Second(
                state_bytes=state_bytes(self.worker), process_bytes=process_bytes()
            )
            while len(self._seconds) > KEPT + 1:
                self._seconds.popitem(last=False)
        return self._seconds[at]

    def snapshot(self, seconds: Iterable[int]) -> dict[str, Any]:
        """What has become of `seconds`, and what is so now."""
        known = dict(self._seconds)
        return {
            "chat": self._chat,
            "drafter": self._drafter,
            "slots": self.worker.slots,
            "queue_limit": self.worker.queue_limit,
            "running": self.worker.running,
            "waiting": self.worker.waiting,
            "refused": self.worker.refused,
            "state_bytes": state_bytes(self.worker),
            "seconds": [_told(known.get(at, Second())) for at in seconds],
        }


def _has_template(worker: Worker) -> bool:
    """Whether conversations can be written for the model."""
    try:
        worker.llm.encoder.check_template()
    except LinspecError:
        return False
    return True


def _told(second: Second) -> dict[str, Any]:
    return {
        "running": second.running,
        "waiting": second.waiting,
        "busy": round(min(1.0, second.busy), 3),
        "prompt_tokens": second.prompt_tokens,
        "tokens": second.tokens,
        "rounds": second.rounds,
        "drafted": second.drafted,
        "accepted": dict(second.accepted),
        "state_bytes": second.state_bytes,
        "process_bytes": second.process_bytes,
    }
