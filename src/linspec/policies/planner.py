"""Given what rounds cost and what drafts bring: the trees with the most tokens per second.

Goodput (Liu et al. 2024, arXiv 2406.14066): a tree of n drafts is worth
(1 + accepted(n)) / (round(n + 1) + drafting(n)), and a batch the sum of its tokens over the seconds that it
shares. Pure arithmetic: no clock, no state, no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from linspec.policies.acceptance import Steps

# draft nodes of the trees that are compared
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
# speculation has to promise this much more than plain decoding before it is used
_MARGIN = 1.03


class Costs(Protocol):
    """What rounds cost, in seconds."""

    def round(self, nodes: float) -> float:
        """A round over `nodes` nodes of all sequences, without what drafts add."""
        ...

    def drafting(self, drafts: int) -> float:
        """What trees of `drafts` drafts add to it."""
        ...

    def asking(self) -> float:
        """Asking a drafter that has no drafts."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Draft nodes of each sequence; and whether perfect drafts would pay at all, whatever was chosen."""

    nodes: tuple[int, ...]
    hopeful: bool


def choose(
    hardness: Sequence[float], steps: Steps, sizes: Sequence[int], costs: Costs, found: float = 1.0
) -> Choice:
    """A size of tree for each sequence: drafts are added where they bring most, as long as that pays.

    What a sequence gains from one draft more never grows with the drafts that it has, so adding the best one
    next is optimal wherever each costs the same. All the sums on the way are compared, as curves have steps.

    hardness: of each sequence, the power that the drafter's probabilities are raised to. gains: draft tokens
    that the drafter expects to be accepted, for each size that may be chosen. found: share of the trees asked
    for in which the drafter has drafts at all.
    """
    count = len(hardness)
    alone = costs.round(count)
    plain = count / alone * _MARGIN
    best, kept, nodes, tokens, most, drafting = plain, 0, 0, float(count), 0, set[int]()
    pieces = sorted(
        (-(chance**power), size, before, sequence)
        for sequence, power in enumerate(hardness)
        for chance, size, before in steps
    )
    for number, (density, size, before, sequence) in enumerate(pieces, 1):
        nodes += size - before
        tokens -= found * density * (size - before)
        most = max(most, size)
        drafting.add(sequence)
        # how often any tree has drafts, and what a round of trees and one without cost
        some = 1 - (1 - found) ** len(drafting)
        drafted = costs.round(count + found * nodes / some) + costs.drafting(most)
        seconds = some * max(drafted, alone) + (1 - some) * (alone + costs.asking())
        if tokens / seconds > best:
            best, kept = tokens / seconds, number
    chosen = [0] * count
    for _, size, _, sequence in pieces[:kept]:
        chosen[sequence] = size
    hopeful = any(
        (count + drafted * size) / (costs.round(count + drafted * size) + costs.drafting(size))
        > plain
        for size in sizes
        for drafted in {1, count}
    )
    return Choice(tuple(chosen), hopeful)


def steps_of(gains: Mapping[int, float]) -> list[tuple[float, int, int]]:
    """(what each draft brings, size, size before it), by ever smaller gains: the upper hull of `gains`."""
    hull: list[tuple[int, float]] = [(0, 0.0)]
    for size in sorted(gains):
        point = (size, min(gains[size], size))
        while len(hull) > 1 and _density(hull[-2], point) >= _density(hull[-2], hull[-1]):
            hull.pop()
        if point[1] > hull[-1][1]:
            hull.append(point)
    return [(_density(low, high), high[0], low[0]) for low, high in pairwise(hull)]


def _density(low: tuple[int, float], high: tuple[int, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])


def affordable(sizes: Sequence[int], count: int, costs: Costs, credit: float) -> int:
    """The largest size of an attempt whose price, in plain rounds, is within `credit`; 0 if none is."""
    plain = costs.round(count)
    for size in sorted(sizes, reverse=True):
        if (costs.round(count + size) + costs.drafting(size)) / plain - 1 <= credit:
            return size
    return 0


def sizes_up_to(most: int) -> tuple[int, ...]:
    """The sizes of trees that have at most `most` drafts."""
    return tuple(nodes for nodes in CANDIDATES if nodes <= most)


def next_size(nodes: int) -> int:
    """The size after `nodes`, or `nodes` itself if none is larger."""
    return next((larger for larger in CANDIDATES if larger > nodes), nodes)
