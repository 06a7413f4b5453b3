"""When a drafter that was switched off is tried again: ever more rarely, and for what can be afforded."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST_PATIENCE, _LAST_PATIENCE = 16, 128
# the first patience with a new request where others were in vain: it may be another kind
_SOON = 4
# plain rounds that may be lost at first, that each round adds, and that can be saved up
_CREDIT, _INCOME, _SAVED = 0.25, 0.007, 2.0


@dataclass(slots=True)
class _Wait:
    """idle: rounds without drafts. open: drafts are asked for until there are some."""

    idle: int
    patience: int
    open: bool = False


class Exploration:
    """Rounds that each request has gone without drafts, and how many it goes on without.

    The wait doubles with every attempt and begins anew when drafts pay. A new request is tried soon, whatever
    the others were like, and then waits as they do. Attempts together may cost a hundredth of the rounds (a
    conservative bandit, Wu et al. 2016, arXiv 1602.04282).

    Attributes:
        credit: plain rounds that the next attempt may cost.
    """

    def __init__(self) -> None:
        self.credit = _CREDIT
        self._patience = _FIRST_PATIENCE
        self._waits: dict[int, _Wait] = {}

    def began(self, slot: int) -> None:
        """A request is in `slot`."""
        if slot not in self._waits:
            patient = self._patience > _FIRST_PATIENCE
            self._waits[slot] = _Wait(0, _SOON if patient else self._patience)

    def earned(self) -> None:
        """A round was decoded."""
        self.credit = min(_SAVED, self.credit + _INCOME)

    def due(self, slot: int, hopeful: bool) -> bool:
        """Whether this round, planned without drafts, is to try some; again until there were some.

        hopeful: perfect drafts would pay. Where they would not, only the costs are looked at again.
        """
        wait = self._waits[slot]
        wait.idle += 1
        wait.open |= wait.idle >= (wait.patience if hopeful else max(wait.patience, 64))
        return wait.open

    def tried(self, slot: int, price: float) -> None:
        """An attempt drafted something, at a loss of `price` plain rounds."""
        wait = self._waits[slot]
        wait.idle, wait.open = 0, False
        wait.patience = min(2 * max(wait.patience, self._patience), _LAST_PATIENCE)
        self._patience = wait.patience
        self.credit -= price

    def planned(self, slot: int) -> None:
        """Drafts were found to pay: the request gets them without being tried."""
        wait = self._waits[slot]
        wait.idle, wait.open = 0, False
        wait.patience = self._patience = _FIRST_PATIENCE

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""
        self._waits.pop(slot, None)
