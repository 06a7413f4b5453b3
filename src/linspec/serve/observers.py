"""What is told about a worker's jobs and steps, for metrics, the page and logs.

All methods are called by the worker's thread, behind a step and after its pieces are handed out; they must
be quick. Times are seconds of the worker's clock. What they raise is logged once and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from linspec.decoding.outcome import Outcome
from linspec.serve.job import Job

_log = logging.getLogger("linspec.serve")


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step of an engine.

    Attributes:
        began: when.
        seconds: how long it took.
        outcomes: what it did to each sequence, with the sequence's job.
        running: sequences that have a slot behind it.
        waiting: sequences that have none yet.
    """

    began: float
    seconds: float
    outcomes: tuple[tuple[Job, Outcome], ...]
    running: int
    waiting: int


class Observer(Protocol):
    """Who is told."""

    def queued(self, job: Job) -> None:
        """A job is in the queue, since `job.queued`."""

    def started(self, job: Job) -> None:
        """The first sequence of a job has a slot, since `job.started`."""

    def stepped(self, step: Stepped) -> None:
        """A step has ended."""

    def ended(self, job: Job) -> None:
        """A job has all its pieces, was cancelled (`job.cancelled`) or broke (`job.error`)."""


class Observers:
    """Several observers, of which none can harm the others or the worker."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)
        self._failed: set[tuple[int, str]] = set()

    def add(self, observer: Observer) -> None:
        """Tell one more."""
        self._observers.append(observer)

    def queued(self, job: Job) -> None:
        """Tell all."""
        self._tell("queued", lambda each: each.queued, job)

    def started(self, job: Job) -> None:
        """Tell all."""
        self._tell("started", lambda each: each.started, job)

    def stepped(self, step: Stepped) -> None:
        """Tell all."""
        self._tell("stepped", lambda each: each.stepped, step)

    def ended(self, job: Job) -> None:
        """Tell all."""
        self._tell("ended", lambda each: each.ended, job)

    def _tell(
        self, what: str, method: Callable[[Observer], Callable[..., None]], told: Any
    ) -> None:
        for at, each in enumerate(self._observers):
            try:
                method(each)(told)
            except Exception:
                if (at, what) not in self._failed:
                    self._failed.add((at, what))
                    _log.exception("%s.%s failed; further failures are silent", type(each), what)
