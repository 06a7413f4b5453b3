"""Which guesses a round verifies, and how many probes each node carries, where probes make the guesses.

A node with n probes gives the next round n levels of guesses, if it is the node that is accepted last. So
rounds are a Markov chain whose state is the number of known levels, and each of its states has a layout of
its own (Chen et al. 2024, arXiv 2405.18628: the dynamic sparse tree). `Layouts` finds those with the most
accepted drafts per round that keep to a number of rows; what a row costs is the policy's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from linspec.drafters.guesses import GuessTree

# each improvement is exact, and they end where nothing changes; two or three do it
_IMPROVEMENTS = 12


@dataclass(frozen=True, slots=True)
class Layout:
    """What a round verifies: the first nodes of a tree of guesses; probes of the root and of each node."""

    nodes: int
    probes: tuple[int, ...]


class Layouts:
    """The best layouts of at most `rows` rows beside the root, one for each number of known levels.

    gain: drafts accepted per round in the long run.
    """

    def __init__(self, trees: Sequence[GuessTree], rows: int) -> None:
        self._trees, self._rows = trees, rows
        # as if half the rows were guesses, and the next rounds brought nothing
        value = np.array([tree.gains[min(max(1, rows // 2), len(tree.paths))] for tree in trees])
        self.of_level, self.gain = list[Layout](), -1.0
        for _ in range(_IMPROVEMENTS):
            layouts = [self._best(level, value) for level in range(len(trees))]
            value, gain = self.judged(layouts)
            if gain <= self.gain + 1e-9:
                break
            self.of_level, self.gain = layouts, gain

    def judged(self, layouts: Sequence[Layout]) -> tuple[np.ndarray, float]:
        """What each state is worth against state 0, and the mean gain of a round, under `layouts`."""
        count = len(layouts)
        moves, gains = np.zeros((count, count)), np.zeros(count)
        for level, layout in enumerate(layouts):
            gains[level] = self._trees[level].gains[layout.nodes]
            np.add.at(moves[level], list(layout.probes), self._trees[level].ends(layout.nodes))
        # h + g = gains + moves h, with h of state 0 as nothing
        system = np.hstack([np.eye(count) - moves, np.ones((count, 1))])
        system = np.vstack([system, np.eye(1, count + 1)])
        found = np.linalg.lstsq(system, np.append(gains, 0.0), rcond=None)[0]
        return found[:-1], float(found[-1])

    def _best(self, level: int, value: np.ndarray) -> Layout:
        """The layout of a state that is best if the next states are worth `value`."""
        tree, best, found = self._trees[level], -np.inf, Layout(0, (0,))
        # a further probe never brings more than the one before it
        more = np.minimum.accumulate(np.diff(value).clip(min=0.0))
        for nodes in range(min(self._rows, len(tree.paths)) + 1):
            worth = np.outer(tree.ends(nodes), more)
            order = np.argsort(-worth, axis=None, kind="stable")[: self._rows - nodes]
            order = order[worth.flat[order] > 0.0]
            total = tree.gains[nodes] + float(worth.flat[order].sum())
            # where both are equal guesses now are better than guesses later
            if total >= best - 1e-12:
                counts = np.bincount(order // max(1, len(more)), minlength=nodes + 1)
                best, found = total, Layout(nodes, tuple(counts.tolist()))
        return found
