"""A guest: a KV cache in blocks of one pool, which forks share until one of them writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from linspec import (
    STATES,
    EntrySpec,
    SlotStates,
    StateError,
    StateOptions,
    StateSnapshot,
    option,
)


@dataclass(frozen=True)
class PagedOptions:
    """How large the pieces are that a sequence takes from the pool."""

    block: int = option("positions of a block", default=16, short=True)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be 1 or more, got {self.block}")


@STATES.register(
    "guest-paged",
    summary="keys and values in blocks of one pool, shared by forks",
    paper="Kwon et al. 2023 (PagedAttention), arXiv 2309.06180",
    options=PagedOptions,
)
class PagedCache(SlotStates):
    """tables[slot]: the blocks of a slot, oldest first. users[block]: how many slots have it; 0 is free.

    keys [blocks, L, Hkv, block, K] and values alike. A block that is shared is copied by who writes first.
    """

    @torch.inference_mode()
    def __init__(
        self,
        spec: EntrySpec,
        layers: int,
        slots: int,
        options: StateOptions,
        paging: PagedOptions,
    ) -> None:
        super().__init__(spec, layers, slots, options)
        self.block = paging.block
        self.tables: list[list[int]] = [[] for _ in range(slots)]
        self.users: list[int] = []
        shape = (0, layers, spec.kv_heads, self.block)
        like = {"dtype": options.dtype, "device": options.device}
        self.keys = torch.zeros(*shape, spec.key_width, **like)
        self.values = torch.zeros(*shape, spec.value_width, **like)

    # ---- blocks

    def _take(self) -> int:
        """A free block, all zero: entries left behind may be NaN, which weights of zero keep alive."""
        if 0 not in self.users:
            more = max(4, len(self.users))
            self.keys, self.values = (
                torch.cat((pool, pool.new_zeros(more, *pool.shape[1:])))
                for pool in (self.keys, self.values)
            )
            self.users += [0] * more
        found = self.users.index(0)
        self.users[found] = 1
        self.keys[found], self.values[found] = 0, 0
        return found

    def _own(self, slot: int, first: int, last: int) -> None:
        """Make the blocks of positions first..last - 1 of `slot` its own to write."""
        table = self.tables[slot]
        while len(table) * self.block < last:
            table.append(self._take())
        for at in range(first // self.block, -(-last // self.block)):
            old = table[at]
            if self.users[old] > 1:
                table[at] = self._take()
                for pool in (self.keys, self.values):
                    pool[table[at]] = pool[old]
                self.users[old] -= 1

    def _trim(self, slot: int, positions: int) -> None:
        """Give back the blocks of `slot` behind its first `positions`."""
        while len(self.tables[slot]) > -(-positions // self.block):
            self.users[self.tables[slot].pop()] -= 1

    def _write(self, layer: int | slice, slot: int, positions: Any, k: Any, v: Any) -> None:
        """Entries k, v [.., Hkv, N, .] at some positions of `slot`, which owns them."""
        for i, position in enumerate(positions):
            block, row = self.tables[slot][position // self.block], position % self.block
            self.keys[block, layer, :, row] = k[..., i, :]
            self.values[block, layer, :, row] = v[..., i, :]

    def _dense(self, pool: torch.Tensor, layer: int | slice, slot: int, width: int) -> torch.Tensor:
        """The first `width` entries of `slot`, [.., Hkv, width, .], zero where there is no block."""
        table = self.tables[slot][: -(-width // self.block)]
        found = pool[table][:, layer].movedim(0, -3).flatten(-3, -2)[..., :width, :]
        return F.pad(found, (0, 0, 0, width - found.shape[-2]))

    # ---- the transaction

    def reserve(self, slot: int, new: int) -> None:
        first = self.lengths[slot] + len(self.staged[slot])
        self._own(slot, first, first + new)

    def stage(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        for i, count in enumerate(lengths):
            first = self.lengths[start + i] + len(self.staged[start + i])
            self._write(layer, start + i, range(first, first + count), k[i], v[i])

    def stage_long(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.stage(layer, start, lengths, k, v)
        slots = range(start, start + len(lengths))
        width = max(self.lengths[slot] + n for slot, n in zip(slots, lengths, strict=True))
        return self.read(layer, slice(slots.start, slots.stop), width)

    def read(self, layer: int, slots: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            torch.stack(
                [self._dense(pool, layer, slot, width) for slot in range(slots.start, slots.stop)]
            )
            for pool in (self.keys, self.values)
        )
        # nothing ever leaves: before position 0 there is nothing
        return keys, F.pad(values, (0, 0, self.spec.conv_history, 0))

    @torch.inference_mode()
    def commit(self, slot: int, path: Sequence[int]) -> None:
        first = self.lengths[slot]
        if any(node != i for i, node in enumerate(path)):
            at = [first + node for node in path]
            every = slice(None)
            k, v = (
                self._dense(pool, every, slot, max(at) + 1)[..., at, :]
                for pool in (self.keys, self.values)
            )
            self._own(slot, first, first + len(path))
            self._write(every, slot, range(first, first + len(path)), k, v)
        self.lengths[slot] += len(path)
        self.drop(slot)

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._trim(slot, self.lengths[slot])

    # ---- slots

    def reset(self, slot: int) -> None:
        self.lengths[slot] = 0
        self.drop(slot)

    @torch.inference_mode()
    def snapshot(self, slot: int) -> StateSnapshot:
        length, every = self.lengths[slot], slice(None)
        keys, values = (self._dense(pool, every, slot, length) for pool in (self.keys, self.values))
        values = F.pad(values, (0, 0, self.spec.conv_history, 0))
        return StateSnapshot(self.spec, self.entries.name, length, 0, keys, values)

    @torch.inference_mode()
    def restore(self, slot: int, copy: Any) -> None:
        self.check(copy)
        self.reset(slot)
        self._own(slot, 0, copy.length)
        values = copy.values[:, :, self.spec.conv_history :]
        self._write(slice(None), slot, range(copy.length), copy.keys, values)
        self.lengths[slot] = copy.length

    def fork(self, source: int, target: int) -> None:
        if source == target:
            return
        self.reset(target)
        held = -(-self.lengths[source] // self.block)
        self.tables[target] = self.tables[source][:held]
        for block in self.tables[target]:
            self.users[block] += 1
        self.lengths[target] = self.lengths[source]

    def check_overwrite(self, slot: int, positions: Sequence[int]) -> None:
        if not all(0 <= position < self.lengths[slot] for position in positions):
            raise StateError(
                f"positions {list(positions)} are not all committed in slot {slot}; stage new ones"
            )

    @torch.inference_mode()
    def overwrite(
        self, layer: int, slot: int, positions: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self.check_overwrite(slot, positions)
        for position in positions:
            self._own(slot, position, position + 1)
        self._write(layer, slot, positions, k, v)

    def bytes_at(self, length: int) -> int:
        return self.entry_bytes(-(-length // self.block) * self.block)
