"""What every drafter does: propose trees, learn from what was accepted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from linspec.decoding.protocols import Generator
from linspec.decoding.sequence import Row
from linspec.decoding.step import STAGE_ROWS
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.registry import Registry

# most draft nodes of any tree: its root takes one row of the stage
MAX_NODES = STAGE_ROWS - 1
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

    target: Generator
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

    A round calls `propose`, then `observe` for each row that had drafts. `started` and `finished` stand
    around a request: what is kept in between goes by `row.slot` or `row.request`, what is kept for
    longer is a memory across requests. The registry makes a drafter from a context and, where it
    has some, its options; one that tests and tools make from other parts has a class method `build`.
    """

    name: ClassVar[str]
    # most draft nodes of one tree
    max_nodes: int = MAX_NODES

    def __init__(self, context: DrafterContext | None = None, options: Any = None) -> None:
        """Keep nothing; a drafter keeps what it needs of them."""

    @abstractmethod
    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[TokenTree]:
        """A tree per row, rooted at `row.root`, within its budget of at least one node and a depth of one.

        Nodes that matter more come first: a policy may have only the first of them verified. Where it
        raises, the engine asks again for each row alone, to end the one whose fault it was: a round that
        is proposed again gets the same trees.
        """

    @abstractmethod
    def expected(self, budget: Budget) -> float:
        """Draft tokens that the best tree within `budget` is expected to have accepted."""

    def started(self, row: Row) -> None:
        """A request has its slot: `row.tokens` is its prompt, of which nothing is read yet."""

    def observe(self, row: Row, tree: TokenTree, path: Sequence[int]) -> None:
        """Learn what the verifier accepted; called before `row.tokens` grows."""

    def finished(self, row: Row) -> None:
        """A request has ended, however it did, and `row.slot` goes to another: `row.tokens` is all it had.

        Called for each one that was to start, also where `started` raised.
        """


class ChainDrafter(Drafter):
    """A drafter of chains: keeps decayed counts of how often each depth is accepted."""

    def __init__(self, context: DrafterContext | None = None, options: Any = None) -> None:
        super().__init__(context, options)
        self._tried: list[float] = []
        self._hits: list[float] = []

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[TokenTree]:
        drafts = self.draft(rows, [budget.chain for budget in budgets])
        return [chain((row.root, *draft)) for row, draft in zip(rows, drafts, strict=True)]

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[int]]:
        """Draft tokens for each row, at most so many."""
        raise NotImplementedError

    def expected(self, budget: Budget) -> float:
        total, reach = 0.0, 1.0
        for depth in range(budget.chain):
            known = depth < len(self._tried)
            tried, hits = (self._tried[depth], self._hits[depth]) if known else (0.0, 0.0)
            reach *= (hits + PRIOR_RATE * PRIOR_COUNT) / (tried + PRIOR_COUNT)
            total += reach
        return total

    def observe(self, row: Row, tree: TokenTree, path: Sequence[int]) -> None:
        drafted, accepted = len(tree) - 1, len(path) - 1
        while len(self._tried) < drafted:
            self._tried.append(0.0)
            self._hits.append(0.0)
        for depth in range(min(drafted, accepted + 1)):
            self._tried[depth] = _FORGET * self._tried[depth] + 1
            self._hits[depth] = _FORGET * self._hits[depth] + (depth < accepted)


DRAFTERS: Registry[Drafter] = Registry("drafter", "linspec.drafters", beside=("none",))
