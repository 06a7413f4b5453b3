"""Several callers at once: each has a stream of what its requests get, and whoever waits drives the engine.

    with EngineStreams(engine).open(requests) as stream:
        for outcome in stream: ...

There is no thread of its own: a caller whose stream is empty takes the engine for one step and hands out what
that step brought to everyone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from weakref import WeakValueDictionary

from linspec.decoding.outcome import FAILED, Outcome
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.engine.engine import Engine
from linspec.engine.results import Collector, Piece
from linspec.errors import StateError


class EngineStreams:
    """The streams of one engine; any thread may open one and read it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # reentrant: the garbage collector may close a forgotten stream in the middle of this thread's step
        self._turn = threading.RLock()
        self._process = os.getpid()
        self._stepping = False
        # a stream that nobody holds any more closes itself
        self._open: WeakValueDictionary[int, Stream] = WeakValueDictionary()
        self._closed_inside: list[Stream] = []

    def open(self, requests: Iterable[Request]) -> Stream:
        """A stream of the outcomes of `requests`, which are added when it is entered."""
        return Stream(self, requests)

    def ask(self, stream: Stream, requests: Iterable[Request]) -> None:
        """Add `requests` for `stream`; raises what `Engine.add` raises, and adds none then."""
        self.engine.check_process()
        self._renew()
        try:
            for request in requests:
                with self._turn:
                    self._check_outside()
                    self._add(stream, request)
        except BaseException:
            stream.close()
            raise

    def _add(self, stream: Stream, request: Request) -> None:
        # it has an owner before it exists: no interrupt can leave one that nobody drops
        handle = self.engine.reserve()
        self._open[handle] = stream
        stream.add(handle)
        self.engine.add(request, handle)
        stream.expect(handle, request.params.n)

    def _renew(self) -> None:
        """In a forked child, a lock that no thread of the parent holds."""
        if self._process != os.getpid():
            self._turn, self._process, self._stepping = threading.RLock(), os.getpid(), False

    def _check_outside(self) -> None:
        """Raise StateError in a call that comes from inside a step, by the thread that steps."""
        if self._stepping:
            raise StateError(
                "this LLM was called from inside one of its own steps, such as by a logits processor; use "
                "another one there: LLM(llm.model, tokenizer=llm.tokenizer)"
            )

    def drive(self, stream: Stream) -> None:
        """Step the engine until `stream` has something, or has nothing to wait for."""
        self._renew()
        while stream.waits:
            with self._turn:
                self._turn_for(stream)

    def _turn_for(self, stream: Stream) -> None:
        # another caller's step may have brought it meanwhile
        if stream.waits:
            self._step()

    def step(self) -> None:
        """One step for all streams, for who reads several; raises what broke it, as `broken` streams tell."""
        self._renew()
        with self._turn:
            self._step()

    def _step(self) -> None:
        self._check_outside()
        try:
            self._stepping = True
            for outcome in self.engine.step():
                self.hand_out(outcome)
        except BaseException as error:
            self._broken(error)
            raise
        finally:
            self._stepping = False
        while self._closed_inside:
            self.close(self._closed_inside[-1])
            self._closed_inside.pop()

    def hand_out(self, outcome: Outcome) -> None:
        """Give an outcome to the stream that waits for it."""
        stream = self._open.get(outcome.sequence.request)
        if stream is not None:
            stream.take(outcome)
            if outcome.sequence.request not in stream.handles:
                self._open.pop(outcome.sequence.request, None)

    def _broken(self, error: BaseException) -> None:
        """A step that was interrupted may have stopped anywhere: nobody can go on from it."""
        self.engine.cancel()
        for stream in set(self._open.values()):
            stream.broken = error
        self._open.clear()

    def close(self, stream: Stream) -> None:
        """Drop what is left of `stream`'s requests."""
        self._renew()
        with self._turn:
            if self._stepping:
                self._closed_inside.append(stream)
                return
            for handle in list(stream.handles):
                self.engine.abort(handle)
                self._open.pop(handle, None)
                del stream.handles[handle]

    def end(self, stream: Stream, sequence: RunningSequence) -> Exception | None:
        """A caller has enough of `sequence`; returns the error of a plug-in that could not let go of it."""
        with self._turn:
            error = self.engine.retire(sequence)
            stream.forget(sequence)
            if sequence.request not in stream.handles:
                self._open.pop(sequence.request, None)
        return error


class Stream:
    """Outcomes of some `requests` as they come; closing it drops what is left of them."""

    def __init__(self, owner: EngineStreams, requests: Iterable[Request]) -> None:
        self._owner, self._asked = owner, requests
        self._ready: deque[Outcome] = deque()
        self.requests: list[int] = []
        # how many sequences of each request have not ended, and those that have
        self.handles: dict[int, int] = {}
        self._ended: set[int] = set()
        self.broken: BaseException | None = None

    @property
    def waits(self) -> bool:
        """Whether there is something to come and nothing there."""
        return bool(self.handles) and not self._ready and self.broken is None

    def add(self, handle: int) -> None:
        """Own a further request."""
        self.requests.append(handle)
        self.handles[handle] = 0

    def expect(self, handle: int, sequences: int) -> None:
        """Wait for the sequences of a request."""
        self.handles[handle] = sequences

    def take(self, outcome: Outcome) -> None:
        """Put an outcome there."""
        self._ready.append(outcome)
        if outcome.finished:
            self._end(outcome.sequence)

    def drain(self) -> list[Outcome]:
        """What is there, without waiting."""
        found = list(self._ready)
        self._ready.clear()
        return found

    def read(self, collector: Collector, outcome: Outcome) -> Piece:
        """What `outcome` is for the caller; a sequence that has ended for the caller is dropped."""
        try:
            piece = collector.take(outcome)
        except Exception as error:
            piece = collector.failed(outcome.sequence, error)
        if piece.done is None:
            return piece
        late = self.drop(outcome.sequence)
        if late is None or piece.done.error is not None:
            return piece
        return replace(piece, done=replace(piece.done, finish_reason=FAILED, error=late))

    def drop(self, sequence: RunningSequence) -> Exception | None:
        """The caller has enough of `sequence`; returns the error of a plug-in that could not let go of it."""
        return self._owner.end(self, sequence)

    def forget(self, sequence: RunningSequence) -> None:
        """Wait for `sequence` no longer, and throw away what is there of it."""
        self._end(sequence)
        self._ready = deque(each for each in self._ready if each.sequence is not sequence)

    def _end(self, sequence: RunningSequence) -> None:
        handle = sequence.request
        if handle not in self.handles or sequence.number in self._ended:
            return
        self._ended.add(sequence.number)
        self.handles[handle] -= 1
        if not self.handles[handle]:
            del self.handles[handle]

    def __iter__(self) -> Iterator[Outcome]:
        while True:
            self._owner.drive(self)
            if self._ready:
                yield self._ready.popleft()
            elif self.broken is not None:
                raise StateError(
                    "another caller of this engine was interrupted in the middle of a step, so this request "
                    "cannot go on; ask again"
                ) from self.broken
            else:
                return

    def close(self) -> None:
        """Drop what is left; closing again changes nothing."""
        self._owner.close(self)

    def __del__(self) -> None:
        # an interrupt may come before the caller closes it, while it does, or before there are handles
        if getattr(self, "handles", None):
            self.close()

    def __enter__(self) -> Stream:
        self._owner.ask(self, self._asked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
