"""What a mixer that sees both ways keeps of a canvas: the keys and values of all positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from linspec.state.contract import LayerState, StateMaker, StateOptions
from linspec.state.entries import FLOATS, EntrySpec
from linspec.state.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasSpec(EntrySpec):
    """As an EntrySpec, and never equal to one: these entries are features, and stay floats."""


@dataclass(slots=True)
class CanvasEntries:
    """The StateMaker of a mixer in a model that overwrites.

    Sums cannot be overwritten, so nothing is summed up in the state: each forward sums over all entries.
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
        return KVCache(self.state_spec(), len(layers), slots, options, FLOATS)
