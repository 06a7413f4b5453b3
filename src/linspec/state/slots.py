"""What every state of entries keeps of its slots: lengths, base positions, staged shapes and tree masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from linspec.decoding.tree import Shape, shape_of
from linspec.decoding.tree_mask import OverwriteMask, TreeMask
from linspec.errors import StateError
from linspec.state.contract import StateOptions
from linspec.state.entries import FLOATS, EntryFormat, EntrySpec
from linspec.state.pages import PagedSnapshot

NOTHING_STAGED = shape_of(())
_MASKS_KEPT = 1024
_MASK_COLUMNS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """A copy of what one slot has committed, in L layers.

    Attributes:
        spec: sizes of the state that it is from.
        entries: name of the format of its entries.
        length: committed tokens.
        base_position: position of the oldest entry that is held.
        keys: [L, Hkv, C, K] for C held positions.
        values: [L, Hkv, conv_history + C, V].
        sums: of closed groups; None for a state without sums.
    """

    spec: EntrySpec
    entries: str
    length: int
    base_position: int
    keys: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor | None = None

    @property
    def layers(self) -> int:
        """L."""
        return len(self.keys)


class SlotStates:
    """Base of states that keep entries: everything but where the entries lie.

    A subclass says how to stage, read, commit, reset, snapshot and restore.
    """

    counts_tokens = True
    # whether it keeps every position one by one, so that what it holds of a text begins with what it holds of
    # each beginning of it: then it has `pages` and `put_pages`
    grows: ClassVar[bool] = False
    entries: EntryFormat = FLOATS
    # whether buffers are as compiled kernels expect them
    contiguous: ClassVar[bool] = False

    def __init__(self, spec: EntrySpec, layers: int, slots: int, options: StateOptions) -> None:
        self.spec, self.layers = spec, layers
        self.dtype, self.device = options.dtype, torch.device(options.device)
        self.lengths = [0] * slots
        self.base_positions = [0] * slots
        self.staged = [NOTHING_STAGED] * slots
        self._tree_masks = options.tree_masks

    @property
    def in_kernels(self) -> bool:
        """Whether compiled kernels may read the buffers."""
        return self.contiguous and self.entries.in_kernels

    def held(self, slot: int) -> int:
        """Committed positions of `slot` whose entries are held one by one."""
        return self.lengths[slot] - self.base_positions[slot]

    def tree_mask(self, start: int, shapes: Sequence[Shape], new: Sequence[int]) -> TreeMask:
        """Mask of slots `start`..: `shapes` of what each has staged, of which the last `new` are new."""
        held = [
            self.lengths[slot] - self.base_positions[slot]
            for slot in range(start, start + len(new))
        ]
        slots = list(zip(held, shapes, new, strict=True))
        key = tuple(slots)
        found = self._tree_masks.get(key)
        if found is None:
            found = TreeMask(slots, self.device)
            if found.width <= _MASK_COLUMNS_KEPT:
                self._tree_masks[key] = found
                if len(self._tree_masks) > _MASKS_KEPT:
                    self._tree_masks.popitem(last=False)
        return found

    def overwrite_mask(
        self, slot: int, positions: Sequence[int], *, causal: bool, blocks: int | None = None
    ) -> TreeMask:
        """Mask of tokens that replace the entries of `slot` at committed positions."""
        base, held = self.base_positions[slot], self.held(slot)
        places = [position - base for position in positions]
        return OverwriteMask(places, held, causal=causal, blocks=blocks, device=self.device)

    def read_sums(self, layer: int, slots: slice) -> torch.Tensor | None:
        """What closed groups became; None where nothing is summed."""
        return None

    def record(self, slot: int, staged: Shape) -> None:
        """Note the shape of all staged nodes of `slot`, after every layer has staged the new ones."""
        self.staged[slot] = staged

    def staged_aside(self, slot: int) -> bool:
        """Whether `slot` has staged a long chain, which nothing can be staged behind."""
        return False

    def unshare(self, slot: int) -> None:
        """Have what `slot` shares with others for itself; here nothing is shared."""

    def drop(self, slot: int) -> None:
        """Forget what `slot` has staged."""
        self.staged[slot] = NOTHING_STAGED

    def check_overwrite(self, slot: int, positions: Sequence[int]) -> None:
        """Raise StateError unless the entries at these committed positions can be replaced."""
        raise StateError(
            f"a {type(self).__name__} cannot overwrite committed positions, it does not keep all of them "
            "one by one; use a model whose layers keep a cache, such as mixer 'softmax'"
        )

    def overwrite(
        self, layer: int, slot: int, positions: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Replace the entries at committed positions; here none can be."""
        self.check_overwrite(slot, positions)

    def open_branches(
        self, slot: int, rows: Sequence[Sequence[int]], places: Sequence[int]
    ) -> None:
        """Ahead of a step that overwrites `rows` of `slot` in branches at these places; here are none."""
        if places:
            raise StateError(
                f"a {type(self).__name__} keeps no branches of a slot; use a cache that does, such as 'float'"
            )

    def overwrite_branch(
        self,
        layer: int,
        slot: int,
        branch: int,
        positions: Sequence[int],
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `overwrite`, in a branch; `open_branches` has refused to make any."""
        raise NotImplementedError

    def keep_branch(self, slot: int, branch: int) -> None:
        """Make `slot` what one of its branches holds, and forget these; here there is none."""

    def hold(self, slot: int, length: int) -> None:
        """Let `slot` hold `length` committed positions that are all overwritten first; here none can be."""
        self.check_overwrite(slot, range(length))

    def lengthen(self, slot: int, length: int) -> None:
        """Add positions behind those of `slot` that are all overwritten first; here none can be."""
        self.check_overwrite(slot, range(self.lengths[slot], length))

    def shorten(self, slot: int, length: int) -> None:
        """Keep only the first `length` positions of a slot that `hold` made; here there is none."""
        self.check_overwrite(slot, range(length))

    def check(self, copy: Any) -> None:
        """Raise StateError if `copy` is a snapshot of another kind of state."""
        mine = (self.spec, self.entries.name, self.layers)
        known = isinstance(copy, StateSnapshot | PagedSnapshot)
        if not known or (copy.spec, copy.entries, copy.layers) != mine:
            raise StateError(
                f"a snapshot of {_described(copy)} does not fit a state of {self.layers} layers of "
                f"{self.spec}, entries {self.entries.name!r}"
            )

    def missing_bytes(self, length: int) -> int:
        """Bytes that are still to be allocated for a sequence of `length` tokens."""
        return 0

    def bytes(self, slot: int) -> int:
        """Bytes that the committed part of `slot` needs."""
        return self.bytes_at(self.lengths[slot])

    def bytes_at(self, length: int) -> int:
        """Bytes that one sequence of `length` committed tokens needs."""
        return self.entry_bytes(length)

    def entry_bytes(self, positions: int) -> int:
        """Bytes of the entries of `positions` positions, and of the convolution's history, in all layers."""
        spec, width = self.spec, self.entries.width
        values = positions + spec.conv_history
        elements = width(spec.key_width) * positions + width(spec.value_width) * values
        return self.layers * spec.kv_heads * elements * self.entries.kept_dtype(self.dtype).itemsize


def _described(copy: Any) -> str:
    if not isinstance(copy, StateSnapshot | PagedSnapshot):
        return f"type {type(copy).__name__}"
    return f"{copy.layers} layers of {copy.spec}, entries {copy.entries!r}"
