"""Sums of the groups of a canvas, each of its own: what mixers that see both ways read of far groups.

Kernels make them of the entries when a step asks for them, see kernels/cpu/csrc/canvas.c. They are no part of
a snapshot, a fork or what slots share: who gets such entries has them made again, by reading these once.
"""

from __future__ import annotations

import torch

from linspec.state.memory import zeros


class GroupSums:
    """Those of all slots of a state.

    Attributes:
        sums: [L, slots, Hkv, groups, S, Z], float32: φ(k) vᵀ, added up over the entries of a group.
        rows: [L, slots, Hkv, groups], int32: of how many entries each is made; 0 for one that is not, or was
            made of others than there are now.
    """

    def __init__(self, layers: int, heads: int, *, group: int, features: int, columns: int) -> None:
        self._layers, self._heads, self.group = layers, heads, group
        self._size = (features, columns)
        self._make(0, 0)

    def ensure(self, slots: int, positions: int) -> None:
        """Make room for so many slots of so many positions; what was made before is made again."""
        groups = -(-positions // self.group)
        if slots > self.rows.shape[1] or groups > self.rows.shape[3]:
            self._make(slots, groups)

    @torch.inference_mode()
    def _make(self, slots: int, groups: int) -> None:
        shape = (self._layers, slots, self._heads, groups)
        self.sums = zeros((*shape, *self._size), torch.float32)
        self.rows = zeros(shape, torch.int32)

    @torch.inference_mode()
    def forget(self, slot: int, first: int, end: int | None) -> None:
        """The entries of `slot` at first .. end - 1 are no longer what they were; None: to the last."""
        last = None if end is None else -(-end // self.group)
        self.rows[:, slot : slot + 1, :, first // self.group : last] = 0

    def bytes_at(self, length: int) -> int:
        """Bytes of those of a sequence of `length` positions."""
        return self._layers * self._heads * self._group_bytes * -(-length // self.group)

    def missing_bytes(self, length: int) -> int:
        """Bytes that are still to be allocated for sequences of `length` positions."""
        _, slots, _, have = self.rows.shape
        more = max(0, -(-length // self.group) - have)
        return more * slots * self._layers * self._heads * self._group_bytes

    @property
    def _group_bytes(self) -> int:
        features, columns = self._size
        return (features * columns + 1) * 4
