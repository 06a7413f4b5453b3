"""When a drafter that was switched off is tried again: after 16 rounds, and ever more rarely."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST_PATIENCE, _LAST_PATIENCE = 16, 512


@dataclass(slots=True)
class _Wait:
    idle: int
    patience: int


class Exploration:
    """Rounds that each request has gone without drafts, and how many it goes on without.

    The wait doubles with every attempt and begins anew when drafts pay. A new request starts with the wait
    of the latest attempts of others: short requests would otherwise each try anew.
    """

    def __init__(self) -> None:
        self._patience = _FIRST_PATIENCE
        self._waits: dict[int, _Wait] = {}

    def began(self, slot: int) -> None:
        """A request is in `slot`."""
        if slot not in self._waits:
            self._waits[slot] = _Wait(0, self._patience)

    def due(self, slot: int, hopeful: bool) -> bool:
        """Whether this round, planned without drafts, is to try some.

        hopeful: perfect drafts would pay. Where they would not, only the costs are looked at again.
        """
        wait = self._waits[slot]
        wait.idle += 1
        if wait.idle < (wait.patience if hopeful else _LAST_PATIENCE):
            return False
        wait.idle, wait.patience = 0, min(2 * wait.patience, _LAST_PATIENCE)
        self._patience = max(self._patience, wait.patience)
        return True

    def planned(self, slot: int) -> None:
        """Drafts were found to pay: the request gets them without being tried."""
        self._waits[slot].idle = 0
        self._waits[slot].patience = self._patience = _FIRST_PATIENCE

    def succeeded(self, slot: int) -> None:
        """An attempt had drafts accepted."""
        self._waits[slot].patience = _FIRST_PATIENCE

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""
        self._waits.pop(slot, None)
