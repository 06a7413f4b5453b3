"""Places of branches: slots behind those of a state, where a step overwrites entries as if it were alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Place:
    """A slot of its own for one branch of another slot.

    number: among the slots of the buffers. held: positions, from 0 on, that were copied here, or overwritten.
    differs: those of them where the slot may hold something else by now.
    """

    number: int
    held: int = 0
    differs: set[int] = field(default_factory=set)

    def missing(self, length: int, written: Collection[int]) -> list[int]:
        """What has to be copied of `length` positions before a step that writes some of them."""
        stale = self.differs.union(range(self.held, length))
        return sorted(stale.difference(written))

    def forget(self) -> None:
        self.held = 0
        self.differs.clear()


class Places:
    """The places of the branches of every slot, once it has had some."""

    def __init__(self) -> None:
        self._of: dict[int, list[Place]] = {}
        self.by_number: dict[int, Place] = {}

    def of(self, slot: int) -> Sequence[Place]:
        """Of branches 1, 2 and so on."""
        return self._of.get(slot, ())

    def give(self, slot: int, numbers: Sequence[int]) -> Sequence[Place]:
        """Places of these numbers, those that the slot has first; returns them."""
        mine = self._of.setdefault(slot, [])
        for number in numbers[len(mine) :]:
            mine.append(Place(number))
            self.by_number[number] = mine[-1]
        return mine[: len(numbers)]

    def overwritten(self, slot: int, positions: Iterable[int]) -> None:
        """Note that a step overwrites these positions, in the slot or in a branch of it."""
        for place in self.of(slot):
            place.differs.update(positions)


def carried(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each position that each branch overwrites, in how many branches behind it this stands there too.

    These overwrite other positions, so they find what an earlier one has left.
    """
    if all(each == rows[0] for each in rows):
        return [[0] * len(each) for each in rows]
    found: list[list[int]] = []
    behind: dict[int, int] = {}
    for at in reversed(range(len(rows))):
        found.append([behind.get(row, len(rows)) - at - 1 for row in rows[at]])
        behind.update(dict.fromkeys(rows[at], at))
    return found[::-1]
