"""A cache of bounded length: the last positions of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.state.buffer import BufferState
from linspec.state.entries import EntrySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSpec(EntrySpec):
    """window: positions that are kept."""

    window: int


class WindowCache(BufferState):
    """Entries that left the window stay until there are as many again: moving the rest costs a copy."""

    spec: WindowSpec

    def _resting(self) -> int:
        return 2 * self.spec.window

    def _leaving(self, held: int, *, aside: bool) -> int:
        if aside or held > self._resting():
            return max(0, held - self.spec.window)
        return 0

    def bytes_at(self, length: int) -> int:
        return self.entry_bytes(min(length, self.spec.window))
