"""What every drafter does: propose trees, learn from what was accepted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from linspec.decoding.protocols import CausalModel
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import LOGITS, MAX_STAGED, Want
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.registry import Registry

# most draft nodes of any tree: its root takes one sequence of the stage
MAX_NODES = MAX_STAGED - 1
# A fresh drafter is believed to be right this often at each depth, as if seen this many times.
PRIOR_RATE = 0.5
PRIOR_COUNT = 4.0
_FORGET = 0.98


@dataclass(frozen=True, slots=True)
class DrafterContext:
    """What a drafter is made for.

    tokenizer: of the target, None if nobody said. source: the target's directory, None for a model in
    memory. slots: sequences that run at once.
    """

    target: CausalModel
    tokenizer: Any = None
    source: Path | None = None
    slots: int = 1

    def decoder(self, name: str) -> Decoder:
        """The target, for a drafter that can draft for decoders only."""
        if not isinstance(self.target, Decoder):
            raise DrafterError(
                f"drafter {name!r} drafts for decoders, and this is a {type(self.target).__name__}; use "
                "prompt-lookup"
            )
        return self.target


class Drafter(ABC):
    """Proposes the tokens that the target verifies; knows no model family.

    A round calls `propose`, then `observe` for each sequence that had drafts. `started` and `finished` stand
    around a request: what is kept in between goes by `sequence.slot` or `sequence.number`, what is kept for
    longer is a memory across requests. The registry makes a drafter from a context and, where it
    has some, its options; one that tests and tools make from other parts has a class method `build`.
    """

    name: ClassVar[str]
    # most draft nodes of one tree
    max_nodes: int = MAX_NODES
    # the target's hidden states that it reads in `sequence.hidden`
    needs: Want = LOGITS

    def __init__(self, context: DrafterContext | None = None, options: Any = None) -> None:
        """Keep nothing; a drafter keeps what it needs of them."""

    @abstractmethod
    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        """A tree per sequence, rooted at its `root`, within its budget of one node or more.

        Nodes that matter more come first: a policy may have only the first of them verified. Where it
        raises, the engine asks again for each sequence alone, to end the one whose fault it was: a round that
        is proposed again gets the same trees.
        """

    @abstractmethod
    def expected(self, budget: Budget) -> float:
        """Draft tokens that the best tree within `budget` is expected to have accepted."""

    def started(self, sequence: RunningSequence) -> None:
        """A request has its slot: `sequence.tokens` is its prompt, of which nothing is read yet."""

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        """Learn what the verifier accepted; called before `sequence.tokens` grows."""

    def finished(self, sequence: RunningSequence) -> None:
        """A request has ended, however it did, and its slot goes to another: `sequence.tokens` is all it had.

        Called for each one that was to start, also where `started` raised.
        """


class ChainDrafter(Drafter):
    """A drafter of chains: keeps decayed counts of how often each depth is accepted."""

    def __init__(self, context: DrafterContext | None = None, options: Any = None) -> None:
        super().__init__(context, options)
        self._tried: list[float] = []
        self._hits: list[float] = []

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        drafts = self.draft(sequences, [budget.chain for budget in budgets])
        return [
            chain((sequence.root, *draft))
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]

    def draft(
        self, sequences: Sequence[RunningSequence], lengths: Sequence[int]
    ) -> list[list[int]]:
        """Draft tokens for each sequence, at most so many."""
        raise NotImplementedError

    def expected(self, budget: Budget) -> float:
        total, reach = 0.0, 1.0
        for depth in range(budget.chain):
            known = depth < len(self._tried)
            tried, hits = (self._tried[depth], self._hits[depth]) if known else (0.0, 0.0)
            reach *= (hits + PRIOR_RATE * PRIOR_COUNT) / (tried + PRIOR_COUNT)
            total += reach
        return total

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        drafted, accepted = len(tree) - 1, len(path) - 1
        while len(self._tried) < drafted:
            self._tried.append(0.0)
            self._hits.append(0.0)
        for depth in range(min(drafted, accepted + 1)):
            self._tried[depth] = _FORGET * self._tried[depth] + 1
            self._hits[depth] = _FORGET * self._hits[depth] + (depth < accepted)


DRAFTERS: Registry[Drafter] = Registry("drafter", "linspec.drafters", beside=("none",))
