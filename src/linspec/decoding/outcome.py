"""What a round did to one sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from linspec.decoding.accepted import Accepted
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree

# `Outcome.finished` of a sequence that failed
FAILED = "error"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round did to one sequence.

    Attributes:
        sequence: the sequence.
        tokens: its new tokens.
        accepted: the result of the verifier; None if the loop has no verifier or failed before it.
        finished: None if the sequence continues, else 'stop' (end of sequence), 'length' or 'error'.
        error: why the sequence failed; None if it did not.
        tree: the drafts that were judged, without the distributions they were sampled from; None where there
            were none.
        drafter: the name of the drafter that proposed them; '' where there were none.
    """

    sequence: RunningSequence
    tokens: tuple[int, ...]
    accepted: Accepted | None
    finished: str | None
    error: Exception | None = None
    tree: TokenTree | None = None
    drafter: str = ""

    @property
    def drafted(self) -> int:
        """How many of the tokens were accepted drafts: the first ones."""
        if self.tree is None or self.accepted is None:
            return 0
        return min(len(self.accepted.path) - 1, len(self.tokens))

    @classmethod
    def failure(cls, sequence: RunningSequence, error: Exception) -> Outcome:
        """The end of a sequence that failed; what it emitted in earlier rounds stands."""
        return cls(sequence, (), None, FAILED, error)


def raise_first(outcomes: Iterable[Outcome]) -> None:
    """Raise the error of the first sequence that failed, for who cannot go on without it."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
