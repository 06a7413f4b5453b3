"""How many drafts to ask for where they cost nothing: more than the last that were worth verifying."""

from __future__ import annotations

from linspec.policies.planner import next_size


class Rooms:
    """Draft nodes that each request is asked for; a new one begins where others are.

    A tree that filled its room and was verified whole doubles the room, about; one that was cut leaves
    little more than what was kept. So drafts that nobody would verify are not made, and a text that repeats
    itself soon gets trees as large as they pay.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most, self._usual = least, most, least
        self._rooms: dict[int, int] = {}

    def of(self, slot: int) -> int:
        """Draft nodes to ask for."""
        return self._rooms.setdefault(slot, self._usual)

    def kept(self, slot: int, kept: int, drafted: int) -> None:
        """Learn that `kept` of `drafted` draft nodes were worth verifying."""
        filled = kept == drafted >= self.of(slot)
        if filled or kept < drafted:
            room = min(self._most, max(self._least, next_size(kept)))
            self._rooms[slot] = self._usual = room

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""
        self._rooms.pop(slot, None)
