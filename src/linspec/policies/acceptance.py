"""How many draft tokens a request is expected to have accepted.

A drafter says for each depth (chains) or rank path (trees) how often it is right over all requests, or
gives a confidence for every node that it drafts. Each request then corrects that by one number, the power
that its probabilities are raised to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_PROMISE_RATE = 0.05
# how much requests are taken to differ at first (variance of the logarithm of their hardness)
_DIFFER = 0.1
# how far hardness wanders in a round (variance of its logarithm), and how far it may get
_WANDER, _WANDER_ALL, _FARTHEST = 0.003, 0.001, 1.8

Steps = Sequence[tuple[float, int, int]]
"""(how likely each draft is accepted, size of the tree, size before), as `planner.steps_of` makes them."""


@dataclass(slots=True)
class Record:
    """How hard a text is for its drafter, as a number that is followed (a Kalman filter on its logarithm).

    hardness: the power h that makes of a probability that the drafter names the one of this text: pʰ. 1
    where the drafter is right, more where it promises too much; a power, because it holds along a path as
    well as for one draft. variance: of the logarithm, what is not known of it. wander: how far it goes in a
    round.
    """

    log: float = 0.0
    variance: float = _DIFFER
    wander: float = _WANDER

    @property
    def hardness(self) -> float:
        return math.exp(self.log)

    def add(self, steps: Steps, drafted: int, accepted: int, expected: float) -> None:
        """Enter one tree, of which the drafter expected so much."""
        power = self.hardness
        named, mean, slope = 0.0, 0.0, 0.0
        for chance, size, before in steps:
            nodes = min(size, drafted) - before
            if nodes <= 0:
                break
            here = nodes * chance**power
            named, mean, slope = (
                named + nodes * chance,
                mean + here,
                slope + here * math.log(chance),
            )
        scale = expected / named if named else 0.0
        mean, slope = scale * mean, scale * slope * power
        noise = min(mean * (1 + mean), mean * max(0.0, drafted - mean)) + 0.05
        self.variance = min(self.variance + self.wander, 1.0)
        gain = self.variance * slope / (slope * slope * self.variance + noise)
        self.log = min(max(self.log + gain * (accepted - mean), -_FARTHEST), _FARTHEST)
        self.variance *= 1 - gain * slope


class AcceptanceModel:
    """A record of each request, and one of all: a new request starts from what others have seen.

    How much requests differ is learned from those that ended: where they do not, a new one is believed less.
    """

    def __init__(self) -> None:
        self._overall = Record(variance=_DIFFER, wander=_WANDER_ALL)
        self._records: dict[int, Record] = {}
        self._differ = _DIFFER
        # what confidences promise, for each draft that the drafter expects to be accepted
        self._promise = 1.0

    def began(self, slot: int) -> None:
        """A request is in `slot`."""
        if slot not in self._records:
            self._records[slot] = Record(self._overall.log, self._differ)

    def hardness(self, slot: int) -> float:
        """How hard the text of the request in `slot` is for its drafter; see `Record`."""
        return self._records[slot].hardness

    def observe(
        self, slot: int, steps: Steps, drafted: int, accepted: int, expected: float
    ) -> None:
        """Learn from one tree of the request in `slot`."""
        named = sum((min(size, drafted) - low) * p for p, size, low in steps if low < drafted)
        if named > 0:
            # confidences that are all too high say only which trees are better than others
            self._promise += _PROMISE_RATE * (expected / named - self._promise)
        for record in (self._records[slot], self._overall):
            record.add(steps, drafted, accepted, expected / max(self._promise, 0.1))

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""
        record = self._records.pop(slot, None)
        if record is not None:
            off = record.log - self._overall.log
            self._differ += 0.1 * (min(1.0, off * off + record.variance) - self._differ)
