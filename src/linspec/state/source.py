"""The keys and values of an encoded source, which cross-attention reads and no step changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linspec.decoding.tree import Shape
from linspec.errors import StateError
from linspec.state.entries import EntrySpec
from linspec.state.kv_cache import KVCache
from linspec.state.slots import SlotStates, StateSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec(EntrySpec):
    """Sizes of what one token of a source keeps."""


class SourceCache(KVCache):
    """`lengths` count the tokens of the sources. All nodes of all token trees share the entries."""

    counts_tokens = False
    grows = False
    contiguous = False

    def fill(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make keys and values [L, H, S, K] the source of `slot`, ahead of its first token."""
        copy = StateSnapshot(self.spec, self.entries.name, keys.shape[2], 0, keys, values)
        self.restore(slot, copy)

    def check_filled(self, slots: Sequence[int]) -> None:
        """Raise StateError if a slot that takes part in a step has no source."""
        for slot in slots:
            if not self.lengths[slot]:
                raise StateError(
                    f"slot {slot} has no source; call the model's `open` or `read` first"
                )

    def reserve(self, slot: int, new: int) -> None:
        """Steps stage nothing here."""

    def record(self, slot: int, staged: Shape) -> None:
        """Steps stage nothing here."""

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """A source stays as it is."""

    def missing_bytes(self, length: int) -> int:
        return 0

    def check_overwrite(self, slot: int, positions: Sequence[int]) -> None:
        SlotStates.check_overwrite(self, slot, positions)
