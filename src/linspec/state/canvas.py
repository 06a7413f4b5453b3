"""What a mixer that sees both ways keeps of a canvas: the keys and values of all positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from linspec.state.contract import LayerState, StateMaker, StateOptions
from linspec.state.entries import FLOATS, EntrySpec
from linspec.state.group_sums import GroupSums
from linspec.state.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasSpec(EntrySpec):
    """As an EntrySpec, and never equal to one: these entries are features, and stay floats."""


@dataclass(slots=True)
class CanvasEntries:
    """The StateMaker of a mixer in a model that overwrites.

    Sums cannot be overwritten, so the state keeps entries: layer by layer each forward sums over all of them,
    and kernels keep the sum of each group beside them.
    """

    mixer: StateMaker
    keeps_cache: bool = False
    offloads: bool = False

    def state_spec(self) -> CanvasSpec:
        own: Any = self.mixer.state_spec()
        return CanvasSpec(
            kv_heads=own.kv_heads, key_width=own.key_width, value_width=own.value_width
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        return Canvas(self.state_spec(), len(layers), slots, options, FLOATS)


class Canvas(KVCache):
    """A cache whose kernels sum up groups: the sums are made again of groups whose entries have changed."""

    @cached_property
    def group_sums(self) -> dict[tuple[int, int, int], GroupSums]:
        """By group, features and columns: layers of one spec may sum up in several ways."""
        return {}

    def keep_sums(self, group: int, features: int, columns: int) -> GroupSums:
        """The sums [features, columns] of groups of this size, with room for all entries there can be."""
        key = (group, features, columns)
        if key not in self.group_sums:
            size = {"group": group, "features": features, "columns": columns}
            self.group_sums[key] = GroupSums(self.layers, self.spec.kv_heads, **size)
        found = self.group_sums[key]
        found.ensure(self.keys.shape[1], self.keys.shape[3])
        return found

    def _changed(self, slot: int, first: int = 0, end: int | None = None) -> None:
        super()._changed(slot, first, end)
        for sums in self.group_sums.values():
            sums.forget(slot, first, end)

    def bytes_at(self, length: int) -> int:
        beside = sum(sums.bytes_at(length) for sums in self.group_sums.values())
        return super().bytes_at(length) + beside

    def missing_bytes(self, length: int) -> int:
        beside = sum(sums.missing_bytes(length) for sums in self.group_sums.values())
        return super().missing_bytes(length) + beside
