"""A KV cache that grows with the sequence: every committed position keeps its entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from linspec.decoding.step import MAX_STAGED
from linspec.errors import StateError
from linspec.state.branches import Branch
from linspec.state.buffer import BufferState
from linspec.state.contract import StateOptions
from linspec.state.entries import EntryFormat, EntrySpec
from linspec.state.registry import STATES


@STATES.register(
    "float",
    summary="keys and values in the dtype of the model, one buffer a sequence",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
)
class KVCache(BufferState):
    """Nothing ever leaves, so committed entries can be overwritten, and long chains are staged in place."""

    grows: ClassVar[bool] = True

    def __init__(
        self,
        spec: EntrySpec,
        layers: int,
        slots: int,
        options: StateOptions,
        entries: EntryFormat | None = None,
    ) -> None:
        super().__init__(spec, layers, slots, options, entries)
        # of a slot: what it holds, then its branches
        self.branches: dict[int, list[Branch]] = {}

    def _resting(self) -> int:
        return MAX_STAGED

    def room_aside(self, slot: int, new: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self._ensure(self._next(slot) + new)
        self.long[slot] = []
        return list(zip(self.keys[:, slot], self.values[:, slot], strict=True))

    @torch.inference_mode()
    def rows(self, slot: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the entries of positions start..stop: keys [L, Hkv, C, K], values [L, Hkv, C, V]."""
        history = self.spec.conv_history
        keys = self.keys[:, slot, :, start:stop]
        return keys.clone(), self.values[:, slot, :, history + start : history + stop].clone()

    @torch.inference_mode()
    def put_rows(self, slot: int, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Make `slot` the sequence whose entries are these `rows`, one piece behind the other."""
        self.reset(slot)
        self._ensure(sum(keys.shape[2] for keys, _ in pieces))
        for keys, values in pieces:
            at = self.lengths[slot]
            self.keys[:, slot, :, at : at + keys.shape[2]] = keys
            first = self.spec.conv_history + at
            self.values[:, slot, :, first : first + keys.shape[2]] = values
            self.lengths[slot] += keys.shape[2]

    def hold(self, slot: int, length: int) -> None:
        self.reset(slot)
        self._ensure(length)
        self.lengths[slot] = length

    @torch.inference_mode()
    def shorten(self, slot: int, length: int) -> None:
        end, history = self.lengths[slot], self.spec.conv_history
        self.lengths[slot] = length
        # as after `reset`: nothing that a zero weight keeps alive
        self.keys[:, slot, :, length:end] = 0
        self.values[:, slot, :, history + length : history + end] = 0

    def missing_bytes(self, length: int) -> int:
        missing = 0
        for entries in (self.keys, self.values):
            have = entries.shape[3]
            missing += max(0, length - have) * (entries.nbytes // have)
        return missing

    def check_overwrite(self, slot: int, positions: Sequence[int]) -> None:
        length = self.lengths[slot]
        if not all(0 <= position < length for position in positions):
            raise StateError(
                f"positions {list(positions)} are not all committed in slot {slot}, which has {length}; "
                "overwrite committed positions, and stage new ones"
            )

    @torch.inference_mode()
    def overwrite(
        self, layer: int, slot: int, positions: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Replace the entries at committed positions by k, v [Hkv, N, .]."""
        self.check_overwrite(slot, positions)
        at = torch.tensor(positions, dtype=torch.long, device=self.device)
        self.keys[layer, slot].index_copy_(1, at, self.entries.encode(k))
        history = self.spec.conv_history
        self.values[layer, slot].index_copy_(1, at + history, self.entries.encode(v))

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self.branches.pop(slot, None)

    @torch.inference_mode()
    def overwrite_branch(
        self,
        layer: int,
        slot: int,
        branch: int,
        positions: Sequence[int],
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `overwrite` behind branch number `branch - 1`, in a copy; returns what `read` would of it."""
        before, mine = self._branches(slot, branch, positions)
        history = self.spec.conv_history
        at = torch.tensor(positions, dtype=torch.long, device=self.device)
        keys = mine.keys[layer].copy_(before.keys[layer])
        values = mine.values[layer].copy_(before.values[layer])
        keys.index_copy_(1, at, self.entries.encode(k))
        values.index_copy_(1, at + history, self.entries.encode(v))
        return self._decoded(keys[None], values[None])

    def _branches(self, slot: int, branch: int, positions: Sequence[int]) -> tuple[Branch, Branch]:
        """A branch, made where there is none, and the one before it."""
        found = self.branches.setdefault(slot, [])
        if not found:
            held = self.lengths[slot]
            values = self.values[:, slot, :, : self.spec.conv_history + held]
            found.append(Branch(self.keys[:, slot, :, :held], values, frozenset()))
        if len(found) == branch:
            found.append(found[-1].follow(positions))
        return found[branch - 1], found[branch]

    @torch.inference_mode()
    def keep_branch(self, slot: int, branch: int) -> None:
        """Overwrite what branch number `branch` has, and forget all of them."""
        if branch:
            kept, history = self.branches[slot][branch], self.spec.conv_history
            at = torch.tensor(sorted(kept.positions), dtype=torch.long, device=self.device)
            self.keys[:, slot].index_copy_(2, at, kept.keys[:, :, at])
            self.values[:, slot].index_copy_(2, at + history, kept.values[:, :, at + history])
        self.branches.pop(slot, None)
