"""A KV cache that grows with the sequence: every committed position keeps its entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from linspec.decoding.step import MAX_STAGED
from linspec.errors import StateError
from linspec.state.buffer import BufferState
from linspec.state.registry import STATES


@STATES.register(
    "float",
    summary="keys and values in the dtype of the model, one buffer a sequence",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
)
class KVCache(BufferState):
    """Nothing ever leaves, so committed entries can be overwritten, and long chains are staged in place."""

    grows: ClassVar[bool] = True

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
