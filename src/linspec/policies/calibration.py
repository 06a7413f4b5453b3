"""What a drafter's confidences are worth: how often a draft of which it says p is accepted.

Logistic calibration (Platt 1999), one for each depth: a temperature and a shift on the log-odds, learned as
drafts are judged. Until a depth has been seen its confidences are taken as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# drafts' worth of the assumption that confidences are right, and how fast old drafts are forgotten
_PRIOR, _FORGET = 10.0, 0.995
_DEPTHS, _BINS = 16, 10


def _odds(chance: float) -> float:
    chance = min(max(chance, 1e-4), 1 - 1e-4)
    return math.log(chance / (1 - chance))


@dataclass(slots=True)
class _Depth:
    """σ(shift + slope·log-odds), by Newton steps towards one draft after the other."""

    shift: float = 0.0
    slope: float = 1.0
    # curvature so far: of the shift, of both, of the slope
    ss: float = _PRIOR / 4
    sl: float = 0.0
    ll: float = _PRIOR

    def __call__(self, confidence: float) -> float:
        return 1 / (1 + math.exp(-(self.shift + self.slope * _odds(confidence))))

    def observe(self, confidence: float, right: bool) -> None:
        odds, found = _odds(confidence), self(confidence)
        weight = max(found * (1 - found), 0.01)
        self.ss = _FORGET * self.ss + weight
        self.sl = _FORGET * self.sl + weight * odds
        self.ll = _FORGET * self.ll + weight * odds * odds
        whole = self.ss * self.ll - self.sl * self.sl
        if whole > 1e-6:
            off = right - found
            self.shift += off * (self.ll - self.sl * odds) / whole
            self.slope += off * (self.ss * odds - self.sl) / whole
            self.slope = min(max(self.slope, 0.05), 5.0)


@dataclass(slots=True)
class _Bin:
    drafts: float = 0.0
    said: float = 0.0
    right: float = 0.0


@dataclass(slots=True)
class Calibration:
    """Probabilities of a drafter's confidences, by depth (from 1; the deepest share one)."""

    depths: list[_Depth] = field(default_factory=lambda: [_Depth() for _ in range(_DEPTHS)])
    bins: list[_Bin] = field(default_factory=lambda: [_Bin() for _ in range(_BINS)])

    def __call__(self, depth: int, confidence: float) -> float:
        """How likely a draft is accepted once its parent is."""
        return self.depths[min(depth, _DEPTHS) - 1](confidence)

    def observe(self, depth: int, confidence: float, right: bool) -> None:
        """A draft behind an accepted parent was judged."""
        here = self.depths[min(depth, _DEPTHS) - 1]
        found = here(confidence)
        bin_ = self.bins[min(int(found * _BINS), _BINS - 1)]
        bin_.drafts, bin_.said, bin_.right = (
            bin_.drafts + 1,
            bin_.said + found,
            bin_.right + right,
        )
        here.observe(confidence, right)

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini et al. 2015): what was said against what was, in the mean."""
        drafts = sum(each.drafts for each in self.bins)
        return sum(abs(each.said - each.right) for each in self.bins) / drafts if drafts else 0.0
