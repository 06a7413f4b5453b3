"""The state of one kind of mixer: rows that are staged beside the committed ones, then kept or dropped.

All mixers here remember rows of keys and values, some also a matrix that sums up closed groups. The
rows of one slot lie in one buffer, oldest first: committed rows, then staged rows. Staging writes
behind the committed rows and never into them; committing a chain only moves the border between the
two, committing a path of a tree first gathers its rows to the front. Rejected rows are simply
overwritten later, so they cost nothing and nothing is ever rolled back.

Positions inside a slot are counted from its *base_position*, the absolute position of buffer row 0.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from linspec.decoding.step import MAX_STAGED
from linspec.decoding.tree import Shape, shape_of
from linspec.decoding.tree_mask import TreeMask
from linspec.errors import StateError
from linspec.quantization.rows import decode, encode, quantized_width
from linspec.utils.ram import available_bytes

TreeMasks = OrderedDict[tuple[Any, ...], TreeMask]
# what sums [Hkv, S, Z] become when rows of keys [Hkv, C, K] and values [Hkv, C, V] close
Fold = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_MASKS_KEPT = 1024
_MASK_COLUMNS_KEPT = 1024
NOTHING_STAGED = shape_of(())


def add_products(sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The plain fold: sums [.., S, V] plus keysᵀ values, in the dtype of the sums."""
    return sums + keys.to(sums.dtype).mT @ values.to(sums.dtype)


def zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Zeros that a CPU has no memory for until something is written: most slots are rarely used."""
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or not count:
        return torch.zeros(*shape, dtype=dtype, device=device)
    # private where the choice exists: a forked child must not write into its parent's state
    options = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    try:
        pages = mmap.mmap(-1, count * dtype.itemsize, **options)
    except (OSError, OverflowError, ValueError) as error:
        raise StateError(
            f"the system has no address space for {count * dtype.itemsize / 2**30:.1f} GiB of state; "
            "lower max_batch, the context or the span"
        ) from error
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


@dataclass(frozen=True, slots=True)
class RowSpec:
    """Sizes of the rows of one kind of mixer; layers with equal specs share one `RowState`.

    kv_heads, key_width, value_width: of one row. conv_history: value rows kept before the base position,
    for the convolution. group: close groups of this many rows; 0 keeps rows. span: groups kept, the open one
    included; older ones close. sum_width, sum_columns: shape of the matrix per head that closed groups
    are folded into; no width forgets them, no columns means those of the values. window: keep this
    many rows; 0 keeps all. quantized: rows are 8-bit codes, see `kv.py`; not where closing groups are
    summed.
    """

    kv_heads: int
    key_width: int
    value_width: int
    conv_history: int = 0
    group: int = 0
    span: int = 1
    sum_width: int = 0
    sum_columns: int = 0
    window: int = 0
    quantized: bool = False

    def row_widths(self) -> tuple[int, int]:
        """Elements of a row of keys and of one of values, as they are kept."""
        if not self.quantized:
            return self.key_width, self.value_width
        return quantized_width(self.key_width), quantized_width(self.value_width)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The committed rows and sums of one slot: keys [L, Hkv, C, .], values [L, Hkv, conv_history + C, .]."""

    spec: RowSpec
    length: int
    base_position: int
    keys: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor | None


class RowState:
    """Committed and staged rows of `slots` sequences, in one layer for each of `folds`.

    folds[i]: what the mixer of layer i makes of its sums when rows close. There is no default: sums
    that are folded by another mixer's rule are wrong without a sign of it.
    """

    @torch.inference_mode()
    def __init__(
        self,
        spec: RowSpec,
        folds: Sequence[Fold],
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tree_masks: TreeMasks | None = None,
    ) -> None:
        self.spec, self.layers, self.folds = spec, len(folds), list(folds)
        rows = self._resting_rows() + MAX_STAGED
        self.dtype = dtype
        self._check_memory(rows, slots)
        kept = torch.int8 if spec.quantized else dtype
        shape = (self.layers, slots, spec.kv_heads)
        key_width, value_width = spec.row_widths()
        self.keys = zeros((*shape, rows, key_width), kept, device)
        self.values = zeros((*shape, spec.conv_history + rows, value_width), kept, device)
        # sums over thousands of tokens lose their small terms below float32
        wide = torch.promote_types(dtype, torch.float32)
        sums = (spec.kv_heads, spec.sum_width, spec.sum_columns or spec.value_width)
        summed = slots if spec.sum_width else 0
        self.sums = torch.zeros(self.layers, summed, *sums, dtype=wide, device=device)
        self.lengths = [0] * slots
        self.base_positions = [0] * slots
        self.staged = [NOTHING_STAGED] * slots
        self.long: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._tree_masks: TreeMasks = OrderedDict() if tree_masks is None else tree_masks

    def _check_memory(self, rows: int, slots: int) -> None:
        """Raise StateError unless one full slot, and the sums of all, fit into memory."""
        spec, free = self.spec, available_bytes()
        key_width, value_width = spec.row_widths()
        kept = 1 if spec.quantized else self.dtype.itemsize
        one = (rows * (key_width + value_width) + spec.conv_history * value_width) * kept
        # float32 or wider, and written when they are made
        sums = spec.sum_width * (spec.sum_columns or spec.value_width) * max(4, self.dtype.itemsize)
        needed = self.layers * spec.kv_heads * (one + sums * slots)
        if free is not None and needed > free:
            raise StateError(
                f"the state of one sequence, {rows} rows in each of {self.layers} layers, and the sums of "
                f"{slots} need {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; "
                "lower max_batch, or take a model of smaller group, span or window"
            )

    def _resting_rows(self) -> int:
        """Most committed rows that stay in the buffer between rounds."""
        if self.spec.group:
            return self.spec.span * self.spec.group
        return 2 * self.spec.window if self.spec.window else MAX_STAGED

    # ---- staging

    def reserve(self, slot: int, new: int) -> None:
        """Make room for `new` more staged rows in `slot`; longer chains are staged aside."""
        if new > MAX_STAGED:
            return
        self._ensure(self._next_row(slot) + new)

    def _ensure(self, rows: int) -> None:
        """Buffers double, so that a cache that grows token by token is copied rarely."""
        have = self.keys.shape[3]
        if rows <= have:
            return
        more = max(rows, 2 * have) - have
        self.keys = self._grown(self.keys, more)
        self.values = self._grown(self.values, more)

    def _grown(self, rows: torch.Tensor, more: int) -> torch.Tensor:
        """A copy with `more` rows a slot; slots without a row stay zero, and so without memory."""
        shape = list(rows.shape)
        shape[3] += more
        grown = zeros(shape, rows.dtype, rows.device)
        for slot, length in enumerate(self.lengths):
            # a chain is in `long` before its nodes are recorded
            if length or self.staged[slot] or slot in self.long:
                grown[:, slot, :, : rows.shape[3]] = rows[:, slot]
        return grown

    def tree_mask(self, start: int, shapes: Sequence[Shape], new: Sequence[int]) -> TreeMask:
        """TreeMask of slots `start`..: `shapes` of what each has staged, of which the last `new` are new."""
        bases = [
            self.lengths[slot] - self.base_positions[slot]
            for slot in range(start, start + len(new))
        ]
        rows = list(zip(bases, shapes, new, strict=True))
        key = tuple(rows)
        found = self._tree_masks.get(key)
        if found is None:
            found = TreeMask(rows, self.keys.device)
            if found.width <= _MASK_COLUMNS_KEPT:
                self._tree_masks[key] = found
                if len(self._tree_masks) > _MASKS_KEPT:
                    self._tree_masks.popitem(last=False)
        return found

    def stage(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write new rows k, v [R, Hkv, N, .] of slots start.. behind what each has staged."""
        if self.spec.quantized:
            k, v = encode(k), encode(v)
        firsts = [self._next_row(start + i) for i in range(len(lengths))]
        conv_history = self.spec.conv_history
        if len(set(firsts)) == 1 and len(set(lengths)) == 1:
            rows = slice(firsts[0], firsts[0] + lengths[0])
            slots = slice(start, start + len(lengths))
            self.keys[layer, slots, :, rows] = k
            self.values[layer, slots, :, conv_history + rows.start : conv_history + rows.stop] = v
            return
        for i, (first, n) in enumerate(zip(firsts, lengths, strict=True)):
            self.keys[layer, start + i, :, first : first + n] = k[i, :, :n]
            self.values[layer, start + i, :, conv_history + first : conv_history + first + n] = v[
                i, :, :n
            ]

    def _next_row(self, slot: int) -> int:
        return self.lengths[slot] - self.base_positions[slot] + len(self.staged[slot])

    def stage_long(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage chains of any length; returns keys and values from each base_position on.

        Keys are [R, Hkv, C, .], values [R, Hkv, conv_history + C, .]: committed rows, then the new ones,
        then zeros.
        """
        if self.spec.quantized:
            k, v = encode(k), encode(v)
        conv_history, slots = self.spec.conv_history, range(start, start + len(lengths))
        base = [self.lengths[s] - self.base_positions[s] for s in slots]
        longest = max(b + n for b, n in zip(base, lengths, strict=True))
        keys = k.new_zeros(len(lengths), k.shape[1], longest, k.shape[3])
        values = v.new_zeros(len(lengths), v.shape[1], conv_history + longest, v.shape[3])
        for i, (slot, b, n) in enumerate(zip(slots, base, lengths, strict=True)):
            keys[i, :, :b] = self.keys[layer, slot, :, :b]
            keys[i, :, b : b + n] = k[i, :, :n]
            values[i, :, : conv_history + b] = self.values[layer, slot, :, : conv_history + b]
            values[i, :, conv_history + b : conv_history + b + n] = v[i, :, :n]
            self.long.setdefault(slot, []).append((keys[i], values[i]))
        return self._floats(keys, values)

    def room_aside(self, slot: int, new: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As `stage_long` for who writes the `new` rows of a chain itself: where they belong.

        Keys [Hkv, C, .] and values [Hkv, W-1 + C, .] of every layer, as they are kept: committed rows,
        then room. A cache that keeps all rows has it in place.
        """
        spec, base = self.spec, self._next_row(slot)
        if not spec.group and not spec.window:
            self._ensure(base + new)
            self.long[slot] = []
            return list(zip(self.keys[:, slot], self.values[:, slot], strict=True))
        shape, behind = (self.layers, spec.kv_heads), spec.conv_history + base
        keys = self.keys.new_empty(*shape, base + new, self.keys.shape[-1])
        values = self.values.new_empty(*shape, behind + new, self.values.shape[-1])
        keys[:, :, :base] = self.keys[:, slot, :, :base]
        values[:, :, :behind] = self.values[:, slot, :, :behind]
        self.long[slot] = list(zip(keys, values, strict=True))
        return self.long[slot]

    def read(self, layer: int, slots: slice, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `rows` rows of some slots as floats: [R, Hkv, rows, K], [R, Hkv, W-1 + rows, V]."""
        keys = self.keys[layer, slots, :, :rows]
        return self._floats(keys, self.values[layer, slots, :, : self.spec.conv_history + rows])

    def _floats(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.spec.quantized:
            return keys, values
        return (
            decode(keys, self.spec.key_width, self.dtype),
            decode(values, self.spec.value_width, self.dtype),
        )

    def record(self, slot: int, staged: Shape) -> None:
        """Record the shape of all rows that `slot` has staged, the newest of them in every layer just now."""
        self.staged[slot] = staged

    # ---- committing

    @torch.inference_mode()
    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Fold the staged rows of `path` in, in order, and drop every other staged row."""
        if slot in self.long:
            self._commit_long(slot, len(path))
        else:
            if any(node != i for i, node in enumerate(path)):
                self._gather(slot, path)
            self.lengths[slot] += len(path)
            self._settle(slot)
        self.drop(slot)

    def drop(self, slot: int) -> None:
        """Forget everything staged in `slot`."""
        self.staged[slot] = NOTHING_STAGED
        self.long.pop(slot, None)

    def _gather(self, slot: int, path: Sequence[int]) -> None:
        first = self.lengths[slot] - self.base_positions[slot]
        index = torch.tensor(path, device=self.keys.device)
        for rows, at in ((self.keys, first), (self.values, self.spec.conv_history + first)):
            rows[:, slot, :, at : at + len(path)] = rows[:, slot].index_select(2, index + at)

    def _settle(self, slot: int) -> None:
        """Close full groups, or let go of rows that left the window."""
        rows = self.lengths[slot] - self.base_positions[slot]
        gone = 0
        if self.spec.group:
            gone = self._closing(rows)
        elif self.spec.window and rows > self._resting_rows():
            gone = rows - self.spec.window
        if not gone:
            return
        conv_history = self.spec.conv_history
        keys, values = self.keys[:, slot], self.values[:, slot]
        if self.spec.sum_width:
            for layer in range(self.layers):
                self._fold(
                    slot,
                    layer,
                    keys[layer, :, :gone],
                    values[layer, :, conv_history : conv_history + gone],
                )
        keys[:, :, : rows - gone] = keys[:, :, gone:rows].clone()
        values[:, :, : conv_history + rows - gone] = values[
            :, :, gone : conv_history + rows
        ].clone()
        self.base_positions[slot] += gone

    def _closing(self, rows: int) -> int:
        """How many of `rows` committed rows belong to groups that close."""
        return max(0, rows // self.spec.group + 1 - self.spec.span) * self.spec.group

    def _fold(self, slot: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.sums[layer, slot] = self.folds[layer](self.sums[layer, slot], keys, values)

    def _commit_long(self, slot: int, count: int) -> None:
        """As `commit` for rows that were staged aside: sum what closes, keep the tail."""
        layers = self.long[slot]
        rows = self.lengths[slot] - self.base_positions[slot] + count
        gone = 0
        if self.spec.group:
            gone = self._closing(rows)
        elif self.spec.window:
            gone = max(0, rows - self.spec.window)
        self._ensure(rows - gone)
        conv_history = self.spec.conv_history
        for layer, (keys, values) in enumerate(layers):
            if self.spec.sum_width and gone:
                self._fold(
                    slot, layer, keys[:, :gone], values[:, conv_history : conv_history + gone]
                )
            self.keys[layer, slot, :, : rows - gone] = keys[:, gone:rows]
            self.values[layer, slot, :, : conv_history + rows - gone] = values[
                :, gone : conv_history + rows
            ]
        self.lengths[slot] += count
        self.base_positions[slot] += gone

    # ---- slots

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """Make `slot` an empty sequence."""
        self.drop(slot)
        self.lengths[slot], self.base_positions[slot] = 0, 0
        # rows left behind are multiplied by zero weights, which would keep a NaN alive
        for rows in (self.keys, self.values):
            rows[:, slot] = 0
        if self.spec.sum_width:
            self.sums[:, slot] = 0

    @torch.inference_mode()
    def snapshot(self, slot: int) -> Snapshot:
        """Copy of all committed rows and sums of `slot`."""
        rows = self.lengths[slot] - self.base_positions[slot]
        return Snapshot(
            spec=self.spec,
            length=self.lengths[slot],
            base_position=self.base_positions[slot],
            keys=self.keys[:, slot, :, :rows].clone(),
            values=self.values[:, slot, :, : self.spec.conv_history + rows].clone(),
            sums=self.sums[:, slot].clone() if self.spec.sum_width else None,
        )

    def check(self, copy: Snapshot) -> None:
        """Raise StateError if `copy` is of another model."""
        if copy.spec != self.spec or len(copy.keys) != self.layers:
            raise StateError(
                f"a snapshot of {len(copy.keys)} layers of {copy.spec} does not fit a state of "
                f"{self.layers} layers of {self.spec}"
            )

    @torch.inference_mode()
    def restore(self, slot: int, copy: Snapshot) -> None:
        """Make `slot` what `snapshot` saw; raises StateError if the copy is of another model."""
        self.check(copy)
        self.reset(slot)
        self._ensure(copy.keys.shape[2])
        self.lengths[slot], self.base_positions[slot] = copy.length, copy.base_position
        self.keys[:, slot, :, : copy.keys.shape[2]] = copy.keys
        self.values[:, slot, :, : copy.values.shape[2]] = copy.values
        if copy.sums is not None:
            self.sums[:, slot] = copy.sums

    def bytes(self, slot: int) -> int:
        """Bytes that the committed part of `slot` needs; constant for grouped mixers."""
        return self.bytes_at(self.lengths[slot])

    def bytes_at(self, length: int) -> int:
        """Bytes that one sequence of `length` committed tokens needs."""
        spec, rows = self.spec, length
        if spec.group or spec.window:
            rows = spec.span * spec.group or min(rows, spec.window)
        key_width, value_width = spec.row_widths()
        elements = key_width * rows + value_width * (rows + spec.conv_history)
        row_bytes = elements * self.keys.element_size()
        sums = self.sums[:, 0].numel() * self.sums.element_size() if spec.sum_width else 0
        return self.layers * spec.kv_heads * row_bytes + sums
