"""One thread that steps an LLM for many callers.

    with Worker(llm, queue_limit=64) as worker:
        job = worker.submit([llm.request("def f(")])
        async for piece in job: ...

The thread takes what was submitted and cancelled, steps, hands out, and tells its observers. Nothing that a
caller does or fails to do stops it: pieces that nobody reads wait in their job.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Self

from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.errors import ConfigError, QueueFull, StateError, WorkerStopped
from linspec.llm import LLM
from linspec.serve.job import Job, ring
from linspec.serve.observers import Observer, Observers, Stepped
from linspec.utils.sizes import check_size

__all__ = ["Job", "Observer", "QueueFull", "Stepped", "Worker"]

_log = logging.getLogger("linspec.serve")
# bounds of what a caller who is refused is told to wait, and the weight of the newest gap between two ends
_LONGEST_WAIT = 60
_NEWEST = 0.2


class Worker:
    """Steps `llm` for many callers; made, it runs.

    queue_limit: most sequences that wait for a slot. `clock` returns seconds.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        queue_limit: int = 64,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_size("queue_limit", queue_limit, least=0)
        self.llm, self.queue_limit, self.clock = llm, queue_limit, clock
        self.slots = llm.engine.scheduler.slots
        # how many jobs were refused for want of room
        self.refused = 0
        self._observers = Observers(observers)
        self._changed = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._dropped: deque[Job] = deque()
        # sequences that have not ended, also those that have just arrived
        self._sequences = 0
        self._jobs: dict[int, Job] = {}
        self._gap, self._last_end = 0.0, clock()
        self._deadline: float | None = None
        # set by the thread when it takes no more, also where it breaks off
        self._over = False
        # of the turn that runs: jobs whose callers to wake, and what to tell the observers then
        self._touched: list[Job] = []
        self._news: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="linspec-worker", daemon=True)
        self._thread.start()

    # ---- for callers, from any thread

    def observe(self, observer: Observer) -> None:
        """Tell one more observer from now on."""
        self._observers.add(observer)

    def submit(
        self,
        requests: Sequence[Request],
        *,
        tenant: str = "",
        name: str = "",
        trace: str = "",
        show_drafts: bool = False,
    ) -> Job:
        """Queue `requests`; never waits for a step.

        tenant: whose they are; nobody else gets what is kept of them. trace: see Job. show_drafts: as in
            `LLM.stream`.

        Raises what `Engine.add` raises, QueueFull where there is no room now, ConfigError for more sequences
        than there ever is room for, and WorkerStopped.
        """
        self._check_fits(sum(request.params.n for request in requests))
        owned = (replace(request, tenant=tenant) for request in requests)
        checked = [self.llm.engine.check(request) for request in owned]
        collectors = [self.llm.collectors(at, each) for at, each in enumerate(checked)]
        for collector in chain.from_iterable(collectors) if show_drafts else ():
            collector.show_drafts()
        job = Job(self, collectors, tenant=tenant, name=name, trace=trace)
        with self._changed:
            self._check_room(job.sequences)
            self._sequences += job.sequences
            self._arrived.append(job)
            self._changed.notify()
        return job

    def _check_room(self, new: int) -> None:
        if not self.ready:
            raise self._stopped("and takes no more requests")
        most = self.slots + self.queue_limit
        if self._sequences + new > most:
            self.refused += 1
            wait = self._wait_for(self._sequences + new - most)
            raise QueueFull(
                f"the queue is full: {self._sequences} outputs run or wait, and there is room for {most}; "
                f"try again in {wait} s",
                wait,
            )

    def _check_fits(self, new: int) -> None:
        """Before anything is made for so many outputs: is there ever room for them?"""
        most = self.slots + self.queue_limit
        if new > most:
            raise ConfigError(
                f"the request asks for {new} outputs at once, this server has room for {most} ({self.slots} "
                f"slots, a queue of {self.queue_limit}); ask for fewer, or raise --queue-limit"
            )

    def _wait_for(self, places: int) -> int:
        """Seconds after which so many more places may be free, as outputs ended lately."""
        return min(_LONGEST_WAIT, max(1, math.ceil(places * self._gap)))

    def drop(self, job: Job) -> None:
        """Take `job` out: `Job.cancel`."""
        with self._changed:
            self._dropped.append(job)
            self._changed.notify()

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self.llm.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that have none yet."""
        return max(0, self._sequences - self.running)

    @property
    def broken(self) -> bool:
        """Whether the thread has ended though nobody closed it."""
        return self._deadline is None and self._over

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._deadline is None and not self._over

    def _stopped(self, so: str) -> WorkerStopped:
        if self.broken:
            return WorkerStopped(f"the model has stopped {so}; the server has to be started again")
        return WorkerStopped(f"the server is shutting down {so}")

    def close(self, finish_seconds: float = 30.0) -> None:
        """Take no more requests; those that are here have so long to finish, then the rest fails."""
        with self._changed:
            deadline = self.clock() + finish_seconds
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            self._changed.notify()

    def stop(self, finish_seconds: float = 30.0) -> None:
        """As `close`, and wait for the end."""
        self.close(finish_seconds)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(0)

    # ---- the thread

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception as error:
                    _log.exception("a turn of the worker broke; its requests have failed")
                    self._end_all(error)
                self._publish()
        finally:
            # also where the thread breaks: nobody waits for what does not come
            self._finish()

    def _finish(self) -> None:
        with self._changed:
            self._over = True
        self._end_all(self._stopped("and this request was not finished in time"))
        self._publish()

    def _wait(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._changed:
            while not (self._jobs or self._arrived or self._dropped):
                if self._deadline is not None:
                    return False
                self._changed.wait()
                self._last_end = self.clock()
            return self._deadline is None or self.clock() < self._deadline

    def _turn(self) -> None:
        """Take the mail, step once, and hand out."""
        arrived, dropped = self._take_mail()
        for job in arrived:
            self._news.append(partial(self._observers.queued, job))
            self._add(job)
        for job in dropped:
            if job.number in self._jobs:
                job.cancelled = True
                self._end(job)
        if not self._jobs:
            return
        began = self.clock()
        try:
            self.llm.streams.step()
        # the streams know that they are broken, and the next request may be sound
        except BaseException:
            _log.exception("a step broke; the requests in it have failed")
        self._hand_out(began, self.clock())

    def _take_mail(self) -> tuple[list[Job], list[Job]]:
        """What has arrived and what was dropped since the last turn."""
        with self._changed:
            arrived, dropped = list(self._arrived), list(dict.fromkeys(self._dropped))
            # what breaks from here on fails them with the others
            self._jobs |= {job.number: job for job in arrived}
            self._arrived.clear()
            self._dropped.clear()
        return arrived, dropped

    def _add(self, job: Job) -> None:
        try:
            job.ask(self.llm.streams.open(job.requests))
        except Exception as error:
            self._end(job, error)

    def _hand_out(self, began: float, now: float) -> None:
        """Turn the outcomes of the step from `began` to `now` into pieces."""
        told: list[tuple[Job, Outcome]] = []
        placed = {each.request for each in self.llm.engine.scheduler.running}
        brought = {
            job: [] if job.stream is None else job.stream.drain() for job in self._jobs.values()
        }
        for job, outcomes in brought.items():
            told += [(job, outcome) for outcome in outcomes]
            if job.started is None and (outcomes or not placed.isdisjoint(job.handles)):
                job.started = began
                self._news.append(partial(self._observers.started, job))
        # a step is told before the ends that it brings
        place = len(self._news)
        for job, outcomes in brought.items():
            self._read(job, outcomes, now)
        step = Stepped(began, now - began, tuple(told), self.running, self.waiting)
        self._news.insert(place, partial(self._observers.stepped, step))

    def _read(self, job: Job, outcomes: Sequence[Outcome], now: float) -> None:
        ended = sum(job.take(outcome, now) for outcome in outcomes)
        if outcomes:
            self._touched.append(job)
        self._freed(ended)
        if not job.left:
            self._end(job)
        elif job.stream is not None and job.stream.broken is not None:
            self._end(job, _broken(job.stream.broken))
        elif not self.llm.engine.busy:
            self._end(job, StateError("this request was dropped by another user of its LLM"))

    def _end_all(self, error: BaseException) -> None:
        self._take_mail()
        for job in list(self._jobs.values()):
            self._end(job, error)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        del self._jobs[job.number]
        try:
            job.close(self.clock(), error)
        except Exception:
            _log.exception("a request has ended, but not for all")
        self._freed(job.left)
        self._touched.append(job)
        self._news.append(partial(self._observers.ended, job))

    def _freed(self, sequences: int) -> None:
        if not sequences:
            return
        now = self.clock()
        gap, self._last_end = (now - self._last_end) / sequences, now
        self._gap += _NEWEST * (gap - self._gap)
        with self._changed:
            self._sequences -= sequences

    def _publish(self) -> None:
        """Wake the callers that have something, then tell the observers."""
        ring(dict.fromkeys(self._touched))
        self._touched.clear()
        news, self._news = self._news, []
        for tell in news:
            tell()


def _broken(cause: BaseException) -> StateError:
    found = StateError(f"the step that computed this request broke: {cause!r}; ask again")
    found.__cause__ = cause
    return found
