"""What every generation loop does: a round for the sequences that run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from linspec.decoding.outcome import Outcome
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import Target
from linspec.drafters.base import Drafter
from linspec.engine.scheduler import Batch
from linspec.policies.base import Policy
from linspec.utils.registry import Registry
from linspec.verifiers.base import Verifier


@dataclass(frozen=True, slots=True)
class LoopContext:
    """What a loop is made for; drafter and policy: None for plain decoding. clock: returns seconds."""

    target: Target
    verifier: Verifier
    drafter: Drafter | None = None
    policy: Policy | None = None
    clock: Callable[[], float] = time.perf_counter


class GenerationLoop(ABC):
    """How the tokens of sequences come about, round by round.

    The engine calls `started` when a sequence has its slot, `round` as long as any runs, and `finished` when
    one has ended, however it did. A loop that does not read prompts through the scheduler's pieces sets
    `sequence.prefilled` in `started`.
    """

    name: ClassVar[str]

    def __init__(self, context: LoopContext, options: Any = None) -> None:
        self.target = context.target

    @abstractmethod
    def started(self, sequence: RunningSequence) -> None:
        """Make the slot of `sequence` ready for its prompt; what this raises ends the sequence."""

    @abstractmethod
    def round(self, batch: Batch) -> list[Outcome]:
        """One round: what it did to the sequences of `batch`; those that wait for more have none.

        A sequence that cannot go on has an outcome with its error, and takes nothing from the others.
        """

    def finished(self, sequence: RunningSequence) -> None:
        """A sequence has ended; forget what was kept of it."""


LOOPS: Registry[GenerationLoop] = Registry("generation loop", "linspec.loops")
