"""One call to a worker: its requests, and the pieces of their outputs as they come.

job = worker.submit([request])
async for piece in job: ...
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.engine.results import Collector, Generation, Piece
from linspec.engine.streams import Stream

if TYPE_CHECKING:
    from linspec.serve.worker import Worker

_numbers = itertools.count(1)


class Job:
    """Some requests that end together; one coroutine reads their pieces.

    Attributes:
        number: unique in this process.
        requests: as the engine gets them.
        tenant: whose requests they are; '' for everybody's.
        name: what logs and pages call them, such as the id of an HTTP request.
        trace: the caller's span, as W3C's traceparent; '' without one.
        queued, started, first, ended: when they were submitted, got the first slot, emitted the first
            token and ended, in seconds of the worker's clock; None before.
        error: what broke all of them; a sequence that failed alone has its error in its last piece.
        cancelled: whether the caller wanted no more.
        finished: the outputs that came to their end; `left` of them did not.
    """

    def __init__(
        self,
        worker: Worker,
        collectors: Sequence[Sequence[Collector]],
        *,
        tenant: str = "",
        name: str = "",
        trace: str = "",
    ) -> None:
        self.number = next(_numbers)
        self.worker, self.collectors = worker, collectors
        self.requests: tuple[Request, ...] = tuple(each[0].request for each in collectors)
        self.tenant, self.name, self.trace = tenant, name, trace
        self.queued: float = worker.clock()
        self.started: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.finished: list[Generation] = []
        # what the worker's thread alone knows: the engine's stream, and what collects open sequences
        self.stream: Stream | None = None
        self._open: dict[tuple[int, int], Collector] = {}
        self.left = sum(map(len, collectors))
        self._pieces: deque[Piece] = deque()
        self._over = False
        self._bell: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def over(self) -> bool:
        """Whether no more pieces come than those that are there."""
        return self._over

    @property
    def handles(self) -> Sequence[int]:
        """What the engine calls the requests; () before it has them."""
        return () if self.stream is None else self.stream.requests

    @property
    def sequences(self) -> int:
        """How many outputs there will be."""
        return sum(map(len, self.collectors))

    def cancel(self) -> None:
        """The caller wants no more: slots are free within one step. Again, or at the end, it does nothing."""
        self.worker.drop(self)

    # ---- the caller's side

    def __aiter__(self) -> Job:
        return self

    async def __anext__(self) -> Piece:
        if self._bell is None:
            self._bell = (asyncio.get_running_loop(), asyncio.Event())
        _, event = self._bell
        while not self._pieces:
            if self._over:
                if self.error is not None:
                    raise self.error
                raise StopAsyncIteration
            await event.wait()
            event.clear()
        return self._pieces.popleft()

    # ---- the worker's side

    def ask(self, stream: Stream) -> None:
        """Hand the requests to the engine, through `stream`; raises what `Engine.add` raises."""
        self.stream = stream
        self.worker.llm.streams.ask(stream, self.requests)
        for handle, each in zip(stream.requests, self.collectors, strict=True):
            self._open |= {(handle, collector.sequence): collector for collector in each}

    def take(self, outcome: Outcome, now: float) -> bool:
        """Turn an outcome into a piece for the caller, whom `ring` wakes; whether its sequence ended."""
        place = (outcome.sequence.request, outcome.sequence.index)
        collector = self._open.get(place)
        # steps of others may have gone on behind a stop text
        if collector is None or self.stream is None:
            return False
        piece = self.stream.read(collector, outcome)
        if self.first is None and piece.token_ids:
            self.first = now
        self._pieces.append(piece)
        if piece.done is None:
            return False
        del self._open[place]
        self.finished.append(piece.done)
        self.left -= 1
        return True

    def close(self, now: float, error: BaseException | None = None) -> None:
        """No more pieces come: what is left in the engine is dropped."""
        if self.stream is not None:
            self.stream.close()
        self.ended, self.error, self._over = now, error, True

    @property
    def bell(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """What wakes the caller; None before it waits for the first time."""
        return self._bell


def ring(jobs: Iterable[Job]) -> None:
    """Wake the callers of `jobs`, with one call for each event loop."""
    bells: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
    for job in jobs:
        if job.bell is not None:
            loop, event = job.bell
            bells.setdefault(loop, []).append(event.set)
    for loop, calls in bells.items():
        try:
            loop.call_soon_threadsafe(_call_all, calls)
        except RuntimeError:
            # the loop is closed: nobody waits there any more
            continue


def _call_all(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()
