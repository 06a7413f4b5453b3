"""Every body of a state, made small, beside the plain lists that it must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from guests import paged_state

from linspec.state.contract import StateOptions
from linspec.state.entries import EntrySpec
from linspec.state.grouped import GroupedSpec, GroupedState, add_products
from linspec.state.registry import STATES, entry_format, new_cache
from linspec.state.window import WindowCache, WindowSpec

LAYERS, SLOTS, HISTORY = 2, 3, 2
SIZES = {"kv_heads": 2, "key_width": 3, "value_width": 4, "conv_history": HISTORY}
WINDOW, GROUP, SPAN = 5, 4, 2
GUESTS = (paged_state,)


def _cache(spec: str) -> Any:
    return new_cache(EntrySpec(**SIZES), LAYERS, SLOTS, StateOptions(torch.float64, kv_cache=spec))


def _window(spec: str) -> Any:
    options = StateOptions(torch.float64, kv_cache=spec)
    sizes = WindowSpec(**SIZES, window=WINDOW)
    return WindowCache(sizes, LAYERS, SLOTS, options, entries=entry_format(options))


def _grouped() -> Any:
    spec = GroupedSpec(**SIZES, group=GROUP, span=SPAN, sum_width=3)
    return GroupedState(spec, [add_products] * LAYERS, SLOTS, StateOptions(torch.float64))


BODIES: dict[str, Callable[[], Any]] = {
    **{f"{name} cache": lambda name=name: _cache(name) for name in STATES.names()},
    "paged cache, block of 1": lambda: _cache("guest-paged:1"),
    **{f"{name} window": lambda name=name: _window(name) for name in STATES.names()},
    "grouped": _grouped,
}
CACHES = [name for name in BODIES if "cache" in name]


@dataclass
class Reference:
    """Committed and staged entries of each slot as plain lists: entries[i] = (k, v), [L, Hkv, .] each."""

    body: Any
    committed: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=lambda: [[] for _ in range(SLOTS)]
    )
    staged: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=lambda: [[] for _ in range(SLOTS)]
    )

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """x as its format gives it back."""
        entries = self.body.entries
        found: torch.Tensor = entries.decode(entries.encode(x), x.shape[-1], torch.float64)
        return found

    def check(self) -> None:
        """The body holds what the lists say, in every slot and layer."""
        for slot in range(SLOTS):
            self._check_slot(slot)

    def _check_slot(self, slot: int) -> None:
        body, committed = self.body, self.committed[slot]
        base = body.base_positions[slot]
        assert body.lengths[slot] == len(committed)
        assert base == left(body, len(committed)) or isinstance(body, WindowCache)
        assert body.bytes(slot) == body.bytes_at(len(committed))
        shown = [*committed[base:], *self.staged[slot]]
        for layer in range(LAYERS):
            keys, values = body.read(layer, slice(slot, slot + 1), len(shown))
            before = committed[max(0, base - HISTORY) : base]
            assert torch.equal(keys[0], column(shown, layer, 0, SIZES["key_width"]))
            expected = column([*before, *shown], layer, 1, SIZES["value_width"])
            assert torch.equal(values[0][:, HISTORY - len(before) :], expected)
            assert not values[0][:, : HISTORY - len(before)].any()
            self._check_sums(slot, layer, base)

    def _check_sums(self, slot: int, layer: int, base: int) -> None:
        found = self.body.read_sums(layer, slice(slot, slot + 1))
        if found is not None:
            gone = self.committed[slot][:base]
            keys = column(gone, layer, 0, SIZES["key_width"])
            values = column(gone, layer, 1, SIZES["value_width"])
            torch.testing.assert_close(found[0], keys.mT @ values)


def left(body: Any, length: int) -> int:
    """How many positions have left a body of `length` committed ones; in a window at least."""
    if isinstance(body, GroupedState):
        return max(0, length // GROUP + 1 - SPAN) * GROUP
    return 0


def column(entries: list[Any], layer: int, which: int, width: int) -> torch.Tensor:
    """Keys (0) or values (1) of one layer: [Hkv, C, width]."""
    if not entries:
        return torch.zeros(SIZES["kv_heads"], 0, width, dtype=torch.float64)
    return torch.stack([entry[which][layer] for entry in entries], dim=1)
