"""What every generation loop does: a round for the sequences that run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import Target
from linspec.drafters.base import Drafter
from linspec.engine.scheduler import Batch
from linspec.policies.base import Policy
from linspec.utils.registry import Registry
from linspec.verifiers.base import Verifier


@dataclass(frozen=True, slots=True)
class LoopContext:
    """What a loop is made for.

    Attributes:
        target: the model with its state.
        verifier: the rule that judges trees.
        drafter: None for plain decoding.
        policy: None for plain decoding.
        clock: returns seconds.
    """

    target: Target
    verifier: Verifier
    drafter: Drafter | None = None
    policy: Policy | None = None
    clock: Callable[[], float] = time.perf_counter


class GenerationLoop(ABC):
    """Makes the tokens of sequences, round by round.

    The engine calls `started` when a sequence has its slot, `round` while sequences run, and `finished` when
    a sequence has ended, also by an error. Between two rounds a sequence may leave its slot, if the loop
    `preempts`: then `paused` is called, and `resumed` when it has a slot again. A loop that reads prompts
    itself, not in the pieces of the scheduler, sets `sequence.prefilled` in `started`.

    Attributes:
        name: under which it is registered.
        patience: rounds in a row that may bring no sequence any further; the next one is an error.
        preempts: whether a sequence may leave its slot before its end.
        takes_pieces: whether prompts come in the pieces of the scheduler.
        reads_in_order: whether the slot of a sequence always holds the first tokens of `sequence.tokens`,
            each read causally and never overwritten. Only then a prefix cache keeps what a slot holds, and
            gives a slot what another one held.
        copies: most copies of its state that a sequence has beside its slot, such as hypotheses and branches.
        lossless: whether outputs are what the rule of the loop makes of the whole model; not so where layers
            are left out.
    """

    name: ClassVar[str]
    patience: int = 1000
    preempts: ClassVar[bool] = False
    takes_pieces: ClassVar[bool] = True
    reads_in_order: ClassVar[bool] = False
    copies: int = 0
    lossless: ClassVar[bool] = True

    def __init__(self, context: LoopContext, options: Any = None) -> None:
        self.target = context.target

    def check_request(self, request: Request) -> None:
        """Raise ConfigError for a request that this loop cannot serve; asked before it is queued."""

    @abstractmethod
    def started(self, sequence: RunningSequence) -> None:
        """Make the slot of `sequence` ready for its prompt; what this raises ends the sequence."""

    @abstractmethod
    def round(self, batch: Batch) -> list[Outcome]:
        """One round; returns an outcome for each sequence that has new tokens or has ended.

        The loop appends new tokens to `sequence.tokens` itself, at most `sequence.remaining` of them. The
        outcome of a sequence that failed has its error. The other sequences lose nothing by it. An outcome
        that breaks a rule ends its sequence with an error that names the loop.
        """

    def paused(self, sequence: RunningSequence) -> Any:
        """A sequence leaves its slot for a while: forget it; what this returns is given to `resumed`."""

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        """It has a slot again, maybe another one, whose state is what it was; what this raises ends it."""

    def finished(self, sequence: RunningSequence) -> None:
        """A sequence has ended; forget what was kept of it."""


LOOPS: Registry[GenerationLoop] = Registry("generation loop", "linspec.loops", base=GenerationLoop)
