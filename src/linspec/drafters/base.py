"""What every drafter does: propose trees, learn from what was accepted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from linspec.registry import Registry
from linspec.row import Row
from linspec.row_state import STAGE_ROWS
from linspec.tree import Budget, TokenTree, chain

# A fresh drafter is believed to be right this often at each depth, as if seen this many times.
PRIOR_RATE = 0.5
PRIOR_COUNT = 4.0
_FORGET = 0.98


class Drafter(ABC):
    """Proposes the tokens that the target verifies; knows no model family."""

    name: ClassVar[str]
    # most draft nodes of one tree: the root takes one row of the stage
    max_nodes: int = STAGE_ROWS - 1

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

    def observe(self, row: Row, tree: TokenTree, path: Sequence[int]) -> None:
        """Learn what the verifier accepted; called before `row.tokens` grows."""

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""


class ChainDrafter(Drafter):
    """A drafter of chains: keeps decayed counts of how often each depth is accepted."""

    def __init__(self) -> None:
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


DRAFTERS: Registry[type[Drafter]] = Registry("drafter")
