"""State as a transaction: stage new rows beside the committed ones, then commit a path or drop all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Self

import torch

from linspec.decoding.tree import Shape
from linspec.errors import StateError
from linspec.state.row_state import Fold, RowSpec, RowState, Snapshot, TreeMasks


class DecoderState:
    """What a whole decoder remembers of up to `slots` sequences: one RowState per kind of layer.

    specs and folds: one for each layer, as its mixer gives them.
    """

    def __init__(
        self,
        specs: Sequence[RowSpec],
        folds: Sequence[Fold],
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        kinds = list(dict.fromkeys(specs))
        # a tree_mask depends on the offset in a buffer and on the tree, not on what the rows hold
        tree_masks: TreeMasks = OrderedDict()
        self.parts = [
            RowState(
                kind,
                [fold for fold, spec in zip(folds, specs, strict=True) if spec == kind],
                slots,
                tree_masks=tree_masks,
                **self._options,
            )
            for kind in kinds
        ]
        seen = [0] * len(kinds)
        # layer -> (its state, its index there)
        self.layers: list[tuple[RowState, int]] = []
        for spec in specs:
            part = kinds.index(spec)
            self.layers.append((self.parts[part], seen[part]))
            seen[part] += 1
        self.slots = slots

    def empty(self, slots: int) -> Self:
        """An empty state of the same model for `slots` sequences."""
        specs = [part.spec for part, _ in self.layers]
        folds = [part.folds[index] for part, index in self.layers]
        return self._make(specs, folds, slots)

    def _make(self, specs: Sequence[RowSpec], folds: Sequence[Fold], slots: int) -> Self:
        return type(self)(specs, folds, slots, **self._options)

    def length(self, slot: int) -> int:
        """Committed tokens of `slot`."""
        return self.parts[0].lengths[slot]

    def staged(self, slot: int) -> Shape:
        """The shape of the staged nodes of `slot`."""
        return self.parts[0].staged[slot]

    def staged_aside(self, slot: int) -> bool:
        """Whether `slot` has staged a long chain, which nothing can be staged behind."""
        return slot in self.parts[0].long

    def reserve(self, slot: int, new: int) -> None:
        """Make room for `new` more staged nodes in `slot`."""
        for part in self.parts:
            part.reserve(slot, new)

    def record(self, slot: int, staged: Shape) -> None:
        """Note the shape of all staged nodes of `slot` after a step has staged more in every layer."""
        for part in self.parts:
            part.record(slot, staged)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Fold the staged nodes of `path` into `slot`; drops the rest. Raises StateError on a bad path."""
        parents = self.staged(slot).parents
        before = -1
        for node in path:
            if not 0 <= node < len(parents) or parents[node] != before:
                raise StateError(
                    f"{list(path)} is not a path from the root of the {len(parents)} staged nodes"
                )
            before = node
        for part in self.parts:
            part.commit(slot, path)

    def drop(self, slot: int) -> None:
        """Forget what `slot` has staged."""
        for part in self.parts:
            part.drop(slot)

    def reset(self, slot: int) -> None:
        """Make `slot` an empty sequence."""
        for part in self.parts:
            part.reset(slot)

    def snapshot(self, slot: int) -> list[Snapshot]:
        """A copy of the committed state of `slot`, for prefix caches, pre-emption and beams."""
        return [part.snapshot(slot) for part in self.parts]

    def restore(self, slot: int, copy: Sequence[Snapshot]) -> None:
        """Make `slot` what `snapshot` saw; raises StateError if the copy is of another model."""
        if len(copy) != len(self.parts):
            raise StateError(f"a snapshot of {len(copy)} parts does not fit {len(self.parts)}")
        # all before any: a half restored slot would be neither the old nor the new
        for part, piece in zip(self.parts, copy, strict=True):
            part.check(piece)
        for part, piece in zip(self.parts, copy, strict=True):
            part.restore(slot, piece)

    def fork(self, source: int, target: int) -> None:
        """Make `target` a copy of the committed state of `source`."""
        self.restore(target, self.snapshot(source))

    def bytes(self, slot: int) -> int:
        """Bytes of the committed state of `slot`."""
        return sum(part.bytes(slot) for part in self.parts)

    def bytes_at(self, length: int) -> int:
        """Bytes of the committed state of one sequence of `length` tokens."""
        return sum(part.bytes_at(length) for part in self.parts)
