"""A tree that grows where its drafter is sure (EAGLE-2, Li et al. 2024, arXiv 2406.16858)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from linspec.decoding.tree import Budget, TokenTree


class ConfidentTree:
    """The likeliest draft nodes by what the drafter holds likely along their paths, within a budget.

    The drafter is asked level by level about the nodes that `next_level` names, for the `top` likeliest
    children of each. No more than `top` nodes of a level are asked about, and none whose children are too
    unlikely to be in the tree: a small tree stops growing early.
    """

    def __init__(self, root: int, budget: Budget, top: int) -> None:
        self.root, self.budget, self.top = root, budget, top
        self.tokens: list[int] = []
        self._parents: list[int] = []
        self._shares: list[float] = []
        # the logarithm of how likely a whole path is
        self._values: list[float] = []
        self._level, self._depth = 0, 0

    def add(self, parent: int, tokens: Sequence[int], shares: Sequence[float]) -> None:
        """Children of a node (-1 for the root), likeliest first, with how likely each is behind it.

        shares: logarithms.
        """
        before = self._values[parent] if parent >= 0 else 0.0
        for token, share in zip(tokens, shares, strict=True):
            self.tokens.append(token)
            self._parents.append(parent)
            self._shares.append(share)
            self._values.append(before + share)

    def next_level(self) -> list[int]:
        """The nodes to ask about, likeliest first, once a level has all its children; none at the end."""
        first, self._level = self._level, len(self.tokens)
        self._depth += 1
        if self._depth >= self.budget.depth:
            return []
        best = heapq.nlargest(self.budget.nodes, self._values)
        least = best[-1] if len(best) == self.budget.nodes else float("-inf")
        level = sorted(range(first, self._level), key=lambda node: -self._values[node])[: self.top]
        return [node for node in level if self._values[node] > least]

    def tree(self) -> TokenTree:
        """The likeliest nodes, likeliest first; none is likelier than its parent, which came first."""
        order = sorted(range(len(self.tokens)), key=lambda node: -self._values[node])
        kept = order[: self.budget.nodes]
        place = {node: at for at, node in enumerate(kept, 1)} | {-1: 0}
        return TokenTree(
            (self.root, *(self.tokens[node] for node in kept)),
            (-1, *(place[self._parents[node]] for node in kept)),
            confidences=(1.0, *(exp_share(self._shares[node]) for node in kept)),
        )


def exp_share(logarithm: float) -> float:
    """A share, from its logarithm."""
    return min(1.0, math.exp(logarithm))
