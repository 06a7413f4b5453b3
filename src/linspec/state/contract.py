"""The contract of all states: stage new entries beside the committed ones, then commit a path or drop them.

A mixer makes its state (`StateMaker.new_state`), so a state cannot exist without the mixer's own rule for
entries that leave it. Layers whose specs are equal share one `LayerState`, so a commit touches all of them
at once. Committed entries never change while a step runs, except by `overwrite`: there is no rollback.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from linspec.decoding.tree import Shape
from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.gpu.choice import DeviceKernels
from linspec.state.entries import EntryFormat

TreeMasks = OrderedDict[tuple[Any, ...], TreeMask]


@dataclass(frozen=True, slots=True)
class StateOptions:
    """What a caller chooses for the states of all layers of a model.

    Attributes:
        dtype: in which the model computes.
        device: where buffers are.
        kv_cache: how caches keep their entries, a spec of STATES.
        offload: a directory for what a state can have in a file; None keeps all in memory.
        tree_masks: shared by all states, because a mask depends only on the tree and on the number of held
            positions.
        kernels: of a device, by which its steps read what is folded; None where torch folds.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    kv_cache: str = "float"
    offload: Path | None = None
    tree_masks: TreeMasks = field(default_factory=OrderedDict)
    kernels: DeviceKernels | None = None


class StateMaker(Protocol):
    """A mixer, or any other part of a block that remembers tokens."""

    # whether `StateOptions.kv_cache` changes anything for its state
    keeps_cache: bool
    # whether it has anything to put into `StateOptions.offload`
    offloads: bool

    def state_spec(self) -> Hashable:
        """The sizes of its state; layers with equal specs share one state object."""
        ...

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        """An empty state for `layers`, makers whose specs equal this one's, and `slots` sequences."""
        ...


# of one layer: a maker, or one for each part of it
Makers = StateMaker | tuple["Makers", ...]


class LayerState(Protocol):
    """What the layers of one kind remember of the committed tokens of every slot.

    A state stages new entries beside the committed ones, then commits a path or drops them. It never rolls
    back.

    Attributes:
        layers: how many layers share it.
        lengths: committed tokens of each slot, for this kind of layer, because a step may skip layers.
        staged: the shape of the nodes that each slot has staged.
        counts_tokens: False if entries are no tokens of the sequence.
    """

    layers: int
    lengths: list[int]
    staged: list[Shape]
    counts_tokens: bool

    @property
    def in_kernels(self) -> bool:
        """Whether compiled kernels may read its buffers."""
        ...

    def reserve(self, slot: int, new: int) -> None:
        """Make room for `new` more staged nodes in `slot`."""
        ...

    def unshare(self, slot: int) -> None:
        """Have what `slot` shares with others for itself: ahead of steps that are no kernel's."""
        ...

    def missing_bytes(self, length: int) -> int:
        """Bytes that are still to be allocated for a sequence of `length` tokens."""
        ...

    def record(self, slot: int, staged: Shape) -> None:
        """Note the shape of all staged nodes of `slot`, after every layer has staged the new ones."""
        ...

    def staged_aside(self, slot: int) -> bool:
        """Whether `slot` has staged a long chain, which nothing can be staged behind."""
        ...

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the staged nodes of `path`, in order, and drop the others."""
        ...

    def drop(self, slot: int) -> None:
        """Forget what `slot` has staged."""
        ...

    def reset(self, slot: int) -> None:
        """Make `slot` an empty sequence."""
        ...

    def snapshot(self, slot: int) -> Any:
        """A copy of what `slot` has committed."""
        ...

    def check(self, copy: Any) -> None:
        """Raise StateError if `copy` is a snapshot of another kind of state."""
        ...

    def restore(self, slot: int, copy: Any) -> None:
        """Make `slot` what `snapshot` saw; raises StateError as `check` does."""
        ...

    def fork(self, source: int, target: int) -> None:
        """Make `target` a copy of what `source` has committed."""
        ...

    def check_overwrite(self, slot: int, positions: Sequence[int]) -> None:
        """Raise StateError unless the entries at these committed positions can be replaced."""
        ...

    def open_branches(
        self, slot: int, rows: Sequence[Sequence[int]], places: Sequence[int]
    ) -> None:
        """Ahead of a step: branch 0, 1 and so on of `slot` overwrite these positions.

        places: slots behind all others that the branches from 1 on have for themselves. There they have what
        `slot` holds, except where they, or branches before them, overwrite it.
        """
        ...

    def keep_branch(self, slot: int, branch: int) -> None:
        """Make `slot` what its branch of this number holds, 0 for itself, and forget the branches."""
        ...

    def hold(self, slot: int, length: int) -> None:
        """Make `slot` a sequence of `length` positions whose entries are overwritten before any is read."""
        ...

    def lengthen(self, slot: int, length: int) -> None:
        """Add positions behind those of `slot`, up to `length`, that are overwritten before any is read."""
        ...

    def shorten(self, slot: int, length: int) -> None:
        """Keep only the first `length` positions of a slot that `hold` made."""
        ...

    def bytes(self, slot: int) -> int:
        """Bytes that the committed part of `slot` needs."""
        ...

    def bytes_at(self, length: int) -> int:
        """Bytes that the committed part of a sequence of `length` tokens needs."""
        ...


class EntryState(LayerState, Protocol):
    """A state of keys and values, as mixers of heads read and write it.

    Positions of a slot count from its base position, that of the oldest entry that is held.
    """

    spec: Any
    entries: EntryFormat

    def held(self, slot: int) -> int:
        """Committed positions of `slot` whose entries are held one by one."""
        ...

    def tree_mask(self, start: int, shapes: Sequence[Shape], new: Sequence[int]) -> TreeMask:
        """Mask of slots `start`..: `shapes` of what each has staged, of which the last `new` are new."""
        ...

    def overwrite_mask(
        self, slot: int, positions: Sequence[int], *, causal: bool, blocks: int | None = None
    ) -> TreeMask:
        """Mask of tokens that replace the entries of `slot` at committed positions."""
        ...

    def stage(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write new entries k, v [R, Hkv, N, .] of slots start.. behind what each has staged."""
        ...

    def stage_long(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage chains of any length; returns keys and values from each base position on.

        Keys are [R, Hkv, C, K], values [R, Hkv, conv_history + C, V]: committed entries, then the new
        ones, then zeros.
        """
        ...

    def read(self, layer: int, slots: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the first `width` positions: [R, Hkv, width, K], [R, Hkv, conv_history + width, V]."""
        ...

    def read_sums(self, layer: int, slots: slice) -> torch.Tensor | None:
        """What closed groups became, [R, Hkv, S, Z]; None where nothing is summed."""
        ...

    def overwrite(
        self, layer: int, slot: int, positions: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Replace the entries at committed positions by k, v [Hkv, N, .]; see `check_overwrite`."""
        ...

    def overwrite_branch(
        self,
        layer: int,
        slot: int,
        branch: int,
        positions: Sequence[int],
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `overwrite` of what branch number `branch - 1` holds (0: the slot), in the place of the branch.

        Returns the entries of the branch, as `read` does those of a slot.
        """
        ...
