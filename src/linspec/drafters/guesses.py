"""Trees of guesses for each depth, made without knowing each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from linspec.decoding.tree import TokenTree, best_first


@dataclass(frozen=True)
class GuessTree:
    """Rank paths of the guesses of some levels, likeliest first; the first n of them are the best tree of n.

    parents: of the nodes, root first. rates: how likely each node is right if its parent is. reach: how
    likely the text goes through each node.
    """

    paths: tuple[tuple[int, ...], ...]
    parents: tuple[int, ...]
    rates: tuple[float, ...]
    reach: np.ndarray

    @classmethod
    def of(cls, accuracies: Sequence[Sequence[float]], most: int) -> GuessTree:
        """At most `most` nodes; accuracies[d][k]: how often the guess of rank k for depth d + 1 is right.

        Guesses that never are get no node.
        """
        paths = [
            path
            for path in best_first(accuracies, most)
            if all(accuracies[depth][rank] > 0 for depth, rank in enumerate(path))
        ]
        index = {path: node for node, path in enumerate(paths, 1)}
        index[()] = 0
        parents = (-1, *(index[path[:-1]] for path in paths))
        rates = (1.0, *(accuracies[len(path) - 1][path[-1]] for path in paths))
        reach = np.ones(len(parents))
        for node in range(1, len(parents)):
            reach[node] = reach[parents[node]] * rates[node]
        return cls(tuple(paths), parents, rates, reach)

    @cached_property
    def gains(self) -> list[float]:
        """gains[n]: drafts that n nodes are expected to have accepted."""
        return list(accumulate(self.reach[1:].tolist(), initial=0.0))

    def ends(self, nodes: int) -> np.ndarray:
        """How likely each of the root and the first `nodes` nodes is the one accepted last."""
        found = self.reach[: nodes + 1].copy()
        np.subtract.at(found, list(self.parents[1 : nodes + 1]), self.reach[1 : nodes + 1])
        return found.clip(min=0.0)

    def top(self, nodes: int) -> int:
        """How many guesses of each depth the first `nodes` nodes need; at least one."""
        return max((path[-1] for path in self.paths[:nodes]), default=0) + 1

    def depth(self, nodes: int) -> int:
        """How deep the first `nodes` nodes go; at least one."""
        return max(map(len, self.paths[:nodes]), default=1)

    def filled(self, root: int, guesses: Sequence[Sequence[int]], nodes: int) -> TokenTree:
        """The tree of the first `nodes` nodes; guesses[d]: tokens for depth d + 1, the likeliest first."""
        nodes = min(nodes, len(self.paths))
        found = (guesses[len(path) - 1][path[-1]] for path in self.paths[:nodes])
        return TokenTree(
            (root, *found), self.parents[: nodes + 1], confidences=self.rates[: nodes + 1]
        )
