"""What a drafter's trees brought over what it promised of them: a factor for each request.

The `auto` policy follows a power instead (`acceptance.py`), which holds for trees of every size.
"""

from __future__ import annotations

from dataclasses import dataclass

_FORGET = 0.9
_PRIOR = 1.0


@dataclass(slots=True)
class _Ratio:
    """What one request's drafts brought, against what was expected of them; old rounds fade."""

    prior: float = 1.0
    accepted: float = 0.0
    expected: float = 0.0

    @property
    def ratio(self) -> float:
        """Accepted drafts for each one that the drafter expects."""
        return (self.accepted + _PRIOR * self.prior) / (self.expected + _PRIOR)

    def add(self, accepted: float, expected: float) -> None:
        """Enter one round."""
        self.accepted = _FORGET * self.accepted + accepted
        self.expected = _FORGET * self.expected + expected


class Ratios:
    """A record of each request, and one of all: a new request starts from what others have seen."""

    def __init__(self) -> None:
        self._overall = _Ratio()
        self._records: dict[int, _Ratio] = {}

    def began(self, slot: int) -> None:
        """A request is in `slot`."""
        if slot not in self._records:
            self._records[slot] = _Ratio(self._overall.ratio)

    def ratio(self, slot: int) -> float:
        """Accepted drafts of the request in `slot` for each one that its drafter expects."""
        return self._records[slot].ratio

    def observe(self, slot: int, accepted: int, expected: float) -> None:
        """Learn from one tree of the request in `slot`."""
        self._records[slot].add(accepted, expected)
        self._overall.add(accepted, expected)

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""
        self._records.pop(slot, None)
