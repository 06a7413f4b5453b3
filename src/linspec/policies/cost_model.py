"""What a round costs on this machine: a measured curve, corrected by the rounds as they run."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.policies.base import RoundTimes
from linspec.policies.costs import CostCurve

_FORGET = 0.9
# weight of the newest plain round, and the most times its expected cost that a round counts
_PLAIN_RATE, _SPIKE = 0.1, 2.0


class CostModel:
    """Seconds of a round: its step by the curve of this machine and model, and what comes beside it.

    Plain rounds say how far the curve is off and what every round costs beside its step; rounds with drafts
    say what drafting adds. It reads no clock: `observe` is told the times.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self._drift = 1.0
        # seconds of a plain round beside its step
        self._rest = 0.0
        self._drafting = _DraftCost()
        self._drafted = False

    def round(self, nodes: int) -> float:
        """Seconds of a round over `nodes` nodes, without what drafts add."""
        return self._drift * self.curve(nodes) + self._rest

    def drafting(self, drafts: int) -> float:
        """Seconds that trees of up to `drafts` drafts add: making them, and what they cost the round."""
        return self._drafting(drafts)

    @property
    def largest(self) -> int:
        """Drafts of the largest tree whose cost is known."""
        return self._drafting.largest

    def observe(self, times: RoundTimes) -> None:
        """Learn from one round."""
        curve = self.curve(times.nodes)
        known = self._drafting(times.drafts) if times.drafts else 0.0
        # something else delayed a round that took far longer than it should
        step = min(times.step, _SPIKE * (self._drift * curve + known))
        if not times.drafts:
            rest = min(times.rest, _SPIKE * self._rest or times.rest)
            self._drift += _PLAIN_RATE * (step / curve - self._drift)
            self._rest += (_PLAIN_RATE if self._rest else 1.0) * (rest - self._rest)
        elif not self._drafted:
            # a first draft makes what drafts need, such as packed weights: it says nothing about the next
            self._drafted = True
        else:
            # drafting also pushes weights out of the caches, and trees take longer to verify and commit
            more = step - self._drift * curve + times.rest - self._rest
            draft = min(times.draft, _SPIKE * known) if known > 0 else times.draft
            self._drafting.observe(times.drafts, draft + more)


@dataclass(slots=True)
class _DraftCost:
    """Seconds that n drafts add to a round beside its step, a + b·n: a line through the rounds so far,
    old ones fading."""

    weight: float = 0.0
    nodes: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0
    slope: float = 0.0
    largest: int = 0

    def observe(self, nodes: int, seconds: float) -> None:
        self.largest = max(self.largest, nodes)
        self.weight = _FORGET * self.weight + 1
        self.nodes = _FORGET * self.nodes + nodes
        self.squares = _FORGET * self.squares + nodes * nodes
        self.seconds = _FORGET * self.seconds + seconds
        self.products = _FORGET * self.products + nodes * seconds
        mean = self.nodes / self.weight
        variance = self.squares / self.weight - mean * mean
        # rounds of one size say nothing about the slope: keep what is known of it
        if variance > 0.5:
            both = self.products / self.weight - mean * self.seconds / self.weight
            self.slope = max(0.0, both / variance)

    def __call__(self, nodes: int) -> float:
        if not self.weight:
            return 0.0
        mean = self.seconds / self.weight
        return max(0.0, mean + self.slope * (nodes - self.nodes / self.weight))
