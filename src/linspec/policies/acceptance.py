"""How many draft tokens a request is expected to have accepted.

A drafter says for each depth (chains) or rank path (trees) how often it is right over all requests, or
gives a confidence for every node that it drafts. Each request then corrects that by one factor: what its
drafts brought, over what was expected of them.
"""

from __future__ import annotations

from dataclasses import dataclass

_FORGET = 0.9
_PRIOR = 1.0


@dataclass(slots=True)
class Record:
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


class AcceptanceModel:
    """A record of each request, and one of all: a new request starts from what others have seen."""

    def __init__(self) -> None:
        self._overall = Record()
        self._records: dict[int, Record] = {}

    def began(self, slot: int) -> None:
        """A request is in `slot`."""
        if slot not in self._records:
            self._records[slot] = Record(self._overall.ratio)

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
