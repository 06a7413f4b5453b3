"""The states of a model as a step of static shape sees them: the same buffers, whole, by tensors of places.

A mixer stages and reads entries through these as through the states themselves. They hold no numbers of their
own; what is committed, staged and seen stands in the tables of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from linspec.decoding.static_mask import StaticTreeMask, StepTables
from linspec.decoding.tree_paths import tree_paths
from linspec.kernels.gpu.reader import DeviceRows, StepReader
from linspec.state.buffer import BufferState
from linspec.state.grouped import GroupedState
from linspec.state.sequence_states import MixedState, SequenceStates
from linspec.state.sinks import SinkState


class StaticEntries:
    """One state, for the R slots of a step; all_slots: they are all slots of the state, in their order."""

    def __init__(
        self, part: BufferState, tables: StepTables, held: torch.Tensor, *, all_slots: bool
    ) -> None:
        self.part, self.spec, self.entries = part, part.spec, part.entries
        # over all columns
        self.mask = StaticTreeMask(tables, held, part.keys.shape[3])
        self._slots = None if all_slots else tables.slots
        self._at = tables.slots[:, None], held[:, None] + tables.nodes

    def stage(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write new entries k, v [R, Hkv, N, .] where the tables say."""
        slots, rows = self._at
        history = self.spec.conv_history
        for kept, new, at in ((self.part.keys, k, rows), (self.part.values, v, rows + history)):
            # [slots, C, Hkv, .], with the heads behind what is indexed
            kept[layer].transpose(1, 2)[slots, at] = self.entries.encode(new).transpose(1, 2)

    def keep(self, sources: torch.Tensor) -> None:
        """In all layers, where each new node lies have the entry of staged node `sources` [R, N]."""
        slots, rows = self._at
        history = self.spec.conv_history
        source = self.mask.held[:, None] + sources
        for kept, behind in ((self.part.keys, 0), (self.part.values, history)):
            # [slots, C, L, Hkv, .], with what is indexed in front
            entries = kept.permute(1, 3, 0, 2, 4)
            entries[slots, rows + behind] = entries[slots, source + behind]

    def read(self, layer: int, slots: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All columns: keys [R, Hkv, C, K] and values [R, Hkv, conv_history + C, V], 0 where no row lies."""
        spec, decode, dtype = self.spec, self.entries.decode, self.part.dtype
        keys, values = (
            self._of_slots(self.part.keys[layer]),
            self._of_slots(self.part.values[layer]),
        )
        no_key, no_value = self._nothing
        return (
            decode(keys, spec.key_width, dtype).masked_fill(no_key, 0),
            decode(values, spec.value_width, dtype).masked_fill(no_value, 0),
        )

    @cached_property
    def _nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where no row of keys and of values lies; the same in every layer."""
        nothing = ~self.mask.there[:, None, :, None]
        return nothing, F.pad(nothing, (0, 0, self.spec.conv_history, 0))

    def read_sums(self, layer: int, slots: slice) -> torch.Tensor | None:
        """What closed groups became, [R, Hkv, S, Z]; None where nothing is summed."""
        part = self.part
        if not isinstance(part, GroupedState) or not part.sums.numel():
            return None
        return part.sums_of(self._of_slots(part.sums[layer]))

    def rows(self, layer: int) -> DeviceRows:
        """What kernels read: the buffers where they lie; of codes, those of the step's slots as floats."""
        part, history, every = self.part, self.spec.conv_history, slice(None)
        there = isinstance(part, GroupedState) and bool(part.sums.numel())
        sums, sinks = part.sums[layer] if there else None, None
        if isinstance(part, SinkState) and sums is not None:
            sinks, sums = part.rows_of(sums), None
        if part.keys.dtype.is_floating_point:
            buffers = part.keys[layer], part.values[layer], sums, self._at[0][:, 0]
            return DeviceRows(*buffers, history, sinks)
        keys, values = self.read(layer, every, self.mask.width)
        if sinks is not None:
            kept = self._of_slots(sinks)
            sinks = self.entries.decode(kept, self.spec.key_width, part.dtype)
        return DeviceRows(keys, values, self.read_sums(layer, every), self._places, history, sinks)

    @cached_property
    def _places(self) -> torch.Tensor:
        return torch.arange(len(self._at[0]), device=self._at[0].device)

    def _of_slots(self, rows: torch.Tensor) -> torch.Tensor:
        # behind the slots of the state there may be places of branches
        if self._slots is None:
            return rows[: len(self._at[0])]
        return rows.index_select(0, self._slots)


class StaticStates:
    """The states of all layers, as `SequenceStates.layers` has them. reader: makes one of the tables of a
    kind of state, held, bases and the paths of the step; None without kernels."""

    def __init__(
        self,
        state: SequenceStates,
        tables: StepTables,
        *,
        all_slots: bool,
        reader: Callable[..., StepReader] | None = None,
    ) -> None:
        made = {
            id(part): StaticEntries(part, tables, held, all_slots=all_slots)
            for part, held in zip(state.parts, tables.held, strict=True)
        }
        if reader is not None:
            # once for all layers
            paths = tree_paths(tables.ancestors, tables.depths, tables.nodes)
            for each, bases in zip(made.values(), tables.bases, strict=True):
                each.mask.reader = reader(each.mask.held, bases, paths)
        self.layers: list[tuple[Any, int]] = [_as_made(place, made) for place in state.layers]
        self._parts, self._nodes = list(made.values()), tables.nodes

    def keep(self, rows: torch.Tensor) -> None:
        """Move entries so that the new nodes of each slot are those of `rows` [R, N]: numbers of columns."""
        sources = self._nodes.gather(1, rows)
        for part in self._parts:
            part.keep(sources)


def _as_made(place: tuple[Any, int], made: dict[int, StaticEntries]) -> tuple[Any, int]:
    state, index = place
    if isinstance(state, MixedState):
        return MixedState(tuple(_as_made(each, made) for each in state.parts)), index
    return made[id(state)], index
