"""The state of grouped mixers: entries of the last groups, and sums of all groups before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from linspec.kernels.gpu.fading import Fading
from linspec.state.buffer import BufferState
from linspec.state.contract import StateOptions
from linspec.state.entries import EntryFormat, EntrySpec

# what sums [Hkv, S, Z] become when entries of keys [Hkv, C, K] and values [Hkv, C, V] close
Fold = Callable[[Any, torch.Tensor, torch.Tensor], Any]


def add_products(sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The plain fold: sums [.., S, V] plus keysᵀ values, in the dtype of the sums."""
    return sums + keys.to(sums.dtype).mT @ values.to(sums.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedSpec(EntrySpec):
    """group: positions of a group, counted from position 0. span: groups kept, the open one included.

    sum_width, sum_columns: shape of the matrix of each head that closed groups are folded into; no width
    forgets them, no columns means those of the values.
    """

    group: int
    span: int = 1
    sum_width: int = 0
    sum_columns: int = 0


class GroupedState(BufferState):
    """Groups close when they fall out of the span; then the mixer folds their entries into the sums.

    folds[i]: what the mixer of layer i makes of its sums when entries close. There is no default: sums
    that are folded by another mixer's rule are wrong without a sign of it. sums [L, slots, Hkv, S, Z] are
    float32 or wider: sums over thousands of tokens lose their small terms below it.

    fadings[i]: the fold of layer i as kernels of a device know it, where `options` have some; None for one
    that they do not know. Without fadings they know none.
    """

    spec: GroupedSpec

    def __init__(
        self,
        spec: GroupedSpec,
        folds: Sequence[Fold],
        slots: int,
        options: StateOptions,
        entries: EntryFormat | None = None,
        fadings: Sequence[Fading | None] = (),
    ) -> None:
        self.folds, self.kernels = list(folds), options.kernels
        # layers of one rule are folded by one launch
        self.alike: dict[Fading, list[int]] = {}
        for layer, fading in enumerate(fadings):
            if fading is not None and spec.sum_width:
                self.alike.setdefault(fading, []).append(layer)
        super().__init__(spec, len(folds), slots, options, entries)

    def _resting(self) -> int:
        return self.spec.span * self.spec.group

    def _leaving(self, held: int, *, aside: bool) -> int:
        return max(0, held // self.spec.group + 1 - self.spec.span) * self.spec.group

    def _let_go(self, slot: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.spec.sum_width:
            return
        # group by group: a sum over several groups at once has other last bits, and what a slot remembers
        # would depend on the pieces in which its tokens came
        sums, group = self.sums[layer, slot], self.spec.group
        for closing in zip(keys.split(group, 1), values.split(group, 1), strict=True):
            sums = self.folds[layer](sums, *closing)
        self.sums[layer, slot] = sums

    def _let_all_go(self, slot: int, gone: int) -> None:
        if self.kernels is None or sum(map(len, self.alike.values())) < self.layers:
            super()._let_all_go(slot, gone)
            return
        # row by row, as nodes read them, so that it does not matter in which pieces they leave
        values = self.values[:, :, :, self.spec.conv_history :]
        buffers = [rows.flatten(0, 1) for rows in (self.sums, self.keys, values)]
        for fading, layers in self.alike.items():
            at = torch.tensor(layers, device=self.device) * self.keys.shape[1] + slot
            rows = torch.arange(gone, device=self.device).expand(len(layers), -1)
            counts = torch.full_like(at, gone)
            self.kernels.fold_rows(*buffers, at, rows, counts, fading)

    # ---- sums

    def _sum_shape(self) -> tuple[int, int, int]:
        spec = self.spec
        return spec.kv_heads, spec.sum_width, spec.sum_columns or spec.value_width

    def _sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _sum_bytes(self) -> int:
        heads, width, columns = self._sum_shape()
        return self.layers * heads * width * columns * self._sum_dtype().itemsize

    def _new_sums(self, slots: int) -> torch.Tensor:
        kept = slots if self.spec.sum_width else 0
        shape = (self.layers, kept, *self._sum_shape())
        return torch.zeros(shape, dtype=self._sum_dtype(), device=self.device)

    def read_sums(self, layer: int, slots: slice) -> torch.Tensor | None:
        return self.sums_of(self.sums[layer, slots]) if self.spec.sum_width else None

    def sums_of(self, kept: torch.Tensor) -> torch.Tensor:
        """Sums [.., Hkv, S, Z] as mixers read them, of sums as they are kept."""
        return kept

    # ---- slots

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        super().reset(slot)
        if self.spec.sum_width:
            self.sums[:, slot] = 0

    @torch.inference_mode()
    def snapshot(self, slot: int) -> Any:
        sums = self.sums[:, slot].clone() if self.spec.sum_width else None
        return replace(super().snapshot(slot), sums=sums)

    @torch.inference_mode()
    def restore(self, slot: int, copy: Any) -> None:
        super().restore(slot, copy)
        if copy.sums is not None:
            self.sums[:, slot] = copy.sums

    def bytes_at(self, length: int) -> int:
        """Constant: the groups of the span are there from the start."""
        return self.entry_bytes(self._resting()) + self._sum_bytes()
