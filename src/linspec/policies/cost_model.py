"""What a round costs on this machine: a measured curve, corrected by the rounds as they run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from linspec.policies.base import RoundTimes
from linspec.policies.costs import CostCurve

_FORGET = 0.95
# and by plain rounds
_AGE = 0.98
# how fast the machine's slowness is followed, and the most (as a logarithm) that one round may say about it
_RATE, _MOST = 0.25, 0.4
# the rate while drafts are held against a plain round, and that of a plain round after many with drafts
_FRESH_RATE, _STALE_RATE = 0.1, 0.7
# share of a slowness that is taken for lasting in each plain round, and of one that turns out not to be
_LASTING, _PASSED = 0.01, 0.2
# rounds after a plain one in which a round with drafts can be held against it
_FRESH = 6
# weight of the assumption that no drafts cost nothing
_NOTHING = 0.3
# weights of the assumptions that the curve is right about more nodes, and that a tree has no other cost
_SLOPE, _FIXED = 0.2, 2.0
# more nodes cost half of what the curve says at least: where rounds say less, the machine became faster
_LEAST_SLOPE = 0.5
# plain rounds that a round may cost more than was known
_JUMP = 1.0
# share of reading a cache that a node more costs: it sees what was read for the others
_SHARED = 0.06
# times the most tokens that caches had, after which what reading them costs is looked at anew
_LONGER = 2
# steps that reading a cache may take, below which nothing is taken for that
_MATTERS = 0.5
# while every round drafts, plain rounds are looked at again this often
_PLAIN_ROUNDS = 64
# rounds after which the curve may be doubted, and by how much it has to be off
_MANY, _WRONG = 40, 1.6
# draft seconds count at most this many times what they were
_SPIKE = 2.0


class CostModel:
    """Seconds of a round: its step by the curve of this machine and model, and what comes beside it.

    How slow the machine is at the moment (cold caches, a core that others use) is a factor on every round,
    with drafts or without. So it is learned from all of them, and what drafts add is learned from those that
    come shortly after a plain one: the factor is the same. It reads no clock: `observe` is told the times.

    Attributes:
        count: sequences of the round that is planned.
        since_plain: rounds since the last one without drafts.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self.count = 1
        self.since_plain = 0
        # log of how many times its usual seconds a round takes now
        self._slow = 0.0
        # usual seconds of a plain round beside what the curve says
        self._rest = 0.0
        # usual seconds that each token of the caches adds, as many as the latest round and the most had
        self._reading, self._cached, self._most_cached = 0.0, 0, 0
        self._plain_rounds = 0
        # rounds with drafts after which a plain one is wanted
        self._plain_after = 0
        self._draft_rounds = 0
        # of drafts that a model makes, and of those that cost next to nothing
        self._drafting, self._free = _DraftCost(), _DraftCost()
        self._rise = _Rise()
        self._asking = 0.0

    @property
    def contradicts(self) -> bool:
        """Whether many rounds say that the curve is wrong about what more nodes cost."""
        slope = self._rise.slope
        return self._rise.rounds >= _MANY and not 1 / _WRONG < slope < _WRONG

    @property
    def _factor(self) -> float:
        return math.exp(self._slow)

    def wants_plain(self) -> bool:
        """Whether the next round should be plain: the first, and one after ever more with drafts."""
        if self.since_plain < self._plain_after:
            return False
        self._plain_after = min(_PLAIN_ROUNDS, max(2, 2 * self._plain_after))
        return True

    def round(self, nodes: float) -> float:
        """Seconds of a round over `nodes` nodes, without what drafts add."""
        return self._factor * (self._plain + self._rise.slope * self._rising(nodes))

    def drafting(self, drafts: int, *, free: bool = False) -> float:
        """Seconds that trees of up to `drafts` drafts add: making them, and what any tree costs the round.

        free: without a model, where some rounds draft with one and some without.
        """
        making = self._free if free else self._drafting
        if not making.weight:
            return 0.0
        return self._factor * (making(drafts) + self._rise.fixed * self._plain)

    @property
    def largest(self) -> int:
        """Drafts of the largest tree whose cost is known."""
        return self._drafting.largest

    @property
    def _plain(self) -> float:
        return self.curve(self.count) + self._rest + self._reading * self._cached

    def _rising(self, nodes: float) -> float:
        """What is known beforehand of more nodes than there are sequences."""
        each = _SHARED * self._reading * self._cached / self.count
        return self.curve(nodes) - self.curve(self.count) + each * (nodes - self.count)

    def price(self, times: RoundTimes, *, free: bool = False) -> float:
        """Plain rounds that one such as `times` costs; free: no model drafted."""
        seconds = self.round(times.nodes) + self.drafting(times.drafts, free=free)
        return seconds / self.round(self.count)

    def asking(self) -> float:
        """Seconds of asking a drafter that has no drafts."""
        return self._factor * self._asking

    def observe(self, times: RoundTimes, *, asked: bool = False, free: bool = False) -> None:
        """Learn from one round.

        asked: the drafter was asked, whether or not it had drafts. free: no model drafted.
        """
        self._cached = times.cached
        if not times.drafts:
            self._observe_plain(times)
            if asked:
                seconds = times.draft / self._factor
                most = _SPIKE * self._asking or seconds
                self._asking += 0.1 * (min(seconds, most) - self._asking)
            return
        self.since_plain += 1
        self._draft_rounds += 1
        if self._makes_ready(times):
            return
        if self.since_plain <= _FRESH:
            usual, plain = 1 / self._factor, self._plain
            making = self._free if free else self._drafting
            making.observe(times.drafts, times.draft * usual)
            # drafting also pushes weights out of the caches, and trees take longer to verify and commit
            more = (times.step + times.rest) * usual - plain
            self._rise.observe(self._rising(times.nodes) / plain, more / plain)
        known = self.round(times.nodes) + self.drafting(times.drafts, free=free)
        rate = _FRESH_RATE if self.since_plain <= _FRESH else _RATE
        self._follow((times.draft + times.step + times.rest) / known, rate)

    def _makes_ready(self, times: RoundTimes) -> bool:
        """Whether drafts were made together with what later ones find ready, such as packed weights.

        The first ones always are; the second ones where each took longer than a plain round.
        """
        dear = times.draft > times.drafts * self.round(self.count)
        return self._draft_rounds == 1 or (self._draft_rounds == 2 and dear)

    def _observe_plain(self, times: RoundTimes) -> None:
        stale, self.since_plain = self.since_plain > _FRESH, 0
        step = self.curve(times.nodes)
        if not self._plain_rounds:
            self._rest = times.rest * step / times.step
        # short caches cannot explain much, and the next plain rounds say whether the machine is slow
        if self.curve.reading * times.cached >= _MATTERS * step:
            self._learn_reading(times)
        rate = _STALE_RATE if stale or self._plain_rounds < 3 else _RATE
        usual = step + self._rest + self._reading * times.cached
        self._follow((times.step + times.rest) / (self._factor * usual), rate)
        self._plain_rounds += 1
        self._rise.fade()
        # what goes on is no disturbance
        leak = _LASTING if self._slow > 0 else _PASSED
        lasting = max(leak * self._slow, -self._rest / usual)
        self._slow -= lasting
        self._rest += lasting * usual

    def _learn_reading(self, times: RoundTimes) -> None:
        """From a plain round behind caches longer than any before; rounds behind others as long lower it."""
        seconds, most = times.step + times.rest, self._reading
        if times.cached > _LONGER * self._most_cached:
            self._most_cached, most = times.cached, self.curve.reading
            seconds /= self._factor
        elif times.cached * _LONGER < self._most_cached:
            return
        # whatever delayed the round that it was taken from did not delay each that follows
        longer = max(0.0, seconds - self.curve(times.nodes) - self._rest)
        self._reading = min(most, longer / times.cached)

    def _follow(self, times_known: float, rate: float) -> None:
        """Move towards the slowness of one round; something else may have delayed it."""
        self._slow += rate * min(max(math.log(times_known), -_MOST), _MOST)


@dataclass(slots=True)
class _DraftCost:
    """Usual seconds of making n drafts, a + b·n: a line through the rounds so far, old ones fading.

    Weakly through nothing for no drafts: fewer drafts than were tried are taken to cost less.
    """

    weight: float = 0.0
    nodes: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0
    largest: int = 0

    def observe(self, nodes: int, seconds: float) -> None:
        if self.weight:
            seconds = min(seconds, _SPIKE * self(nodes))
        self.largest = max(self.largest, nodes)
        self.weight = _FORGET * self.weight + 1
        self.nodes = _FORGET * self.nodes + nodes
        self.squares = _FORGET * self.squares + nodes * nodes
        self.seconds = _FORGET * self.seconds + seconds
        self.products = _FORGET * self.products + nodes * seconds

    def __call__(self, nodes: int) -> float:
        weight = self.weight + _NOTHING
        mean, seconds = self.nodes / weight, self.seconds / weight
        variance = self.squares / weight - mean * mean
        slope = max(0.0, (self.products / weight - mean * seconds) / variance)
        return max(0.0, seconds + slope * (nodes - mean))


@dataclass(slots=True)
class _Rise:
    """What nodes beyond the sequences cost: `slope` times what the curve says, and `fixed` plain rounds.

    A ridge towards the curve itself (1 and 0), old rounds fading.
    """

    slope: float = 1.0
    fixed: float = 0.0
    rounds: int = 0
    weight: float = _FIXED
    x: float = 0.0
    xx: float = _SLOPE
    y: float = 0.0
    xy: float = 0.0

    def fade(self) -> None:
        """A round without drafts: what was learned of drafts is a little older."""
        self.x, self.y, self.xy = _AGE * self.x, _AGE * self.y, _AGE * self.xy
        self.xx = _SLOPE + _AGE * (self.xx - _SLOPE)
        self.weight = _FIXED + _AGE * (self.weight - _FIXED)
        self._fit()

    def observe(self, said: float, seen: float) -> None:
        """A round whose drafts cost `seen` plain rounds, where the curve says `said`."""
        self.rounds += 1
        known = self.slope * said + self.fixed
        jump = max(_JUMP, known)
        off = min(max(seen, known - jump), known + jump) - said
        self.weight = _FORGET * self.weight + 1 + _FIXED * (1 - _FORGET)
        self.xx = _FORGET * self.xx + said * said + _SLOPE * (1 - _FORGET)
        self.x = _FORGET * self.x + said
        self.y = _FORGET * self.y + off
        self.xy = _FORGET * self.xy + said * off
        self._fit()

    def _fit(self) -> None:
        whole = self.xx * self.weight - self.x * self.x
        self.slope = max(_LEAST_SLOPE, 1 + (self.xy * self.weight - self.x * self.y) / whole)
        self.fixed = max(0.0, (self.xx * self.y - self.x * self.xy) / whole)
