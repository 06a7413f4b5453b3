"""Given what rounds cost and what drafts bring: the trees with the most tokens per second.

Goodput (Liu et al. 2024, arXiv 2406.14066): a tree of n drafts is worth
(1 + accepted(n)) / (round(n + 1) + drafting(n)). Pure arithmetic: no clock, no state, no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# draft nodes of the trees that are compared
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
# speculation has to promise this much more than plain decoding before it is used
_MARGIN = 1.03


class Costs(Protocol):
    """What rounds cost, in seconds."""

    def round(self, nodes: int) -> float:
        """A round over `nodes` nodes of all sequences, without what drafts add."""
        ...

    def drafting(self, drafts: int) -> float:
        """What trees of `drafts` drafts add to it."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Draft nodes of each sequence; and whether perfect drafts would pay at all, whatever was chosen."""

    nodes: tuple[int, ...]
    hopeful: bool


def choose(ratios: Sequence[float], gains: Mapping[int, float], costs: Costs) -> Choice:
    """One size of tree and the sequences that get it: those that do best come first.

    ratios: accepted drafts of each sequence for each one that the drafter expects. gains: draft tokens
    that the drafter expects to be accepted, for each size that may be chosen.
    """
    count = len(ratios)
    ranked = sorted(range(count), key=ratios.__getitem__, reverse=True)
    plain = count / costs.round(count) * _MARGIN
    best, best_nodes, best_count, hopeful = plain, 0, 0, False
    for nodes, gain in gains.items():
        tokens, drafting = float(count), costs.drafting(nodes)
        for drafted, sequence in enumerate(ranked, 1):
            tokens += min(ratios[sequence] * gain, nodes)
            seconds = costs.round(count + drafted * nodes) + drafting
            hopeful |= (count + drafted * nodes) / seconds > plain
            if tokens / seconds > best:
                best, best_nodes, best_count = tokens / seconds, nodes, drafted
    chosen = [0] * count
    for sequence in ranked[:best_count]:
        chosen[sequence] = best_nodes
    return Choice(tuple(chosen), hopeful)


def sizes_up_to(most: int) -> tuple[int, ...]:
    """The sizes of trees that have at most `most` drafts."""
    return tuple(nodes for nodes in CANDIDATES if nodes <= most)


def next_size(nodes: int) -> int:
    """The size after `nodes`, or `nodes` itself if none is larger."""
    return next((larger for larger in CANDIDATES if larger > nodes), nodes)
