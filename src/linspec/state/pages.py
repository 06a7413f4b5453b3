"""Pages: entries of PAGE neighbouring positions, which slots, snapshots and prefix caches share.

What a page holds never changes once it is made, so it can be read by everybody who has it, and who wants to
write copies it first. Who lets go of a page last frees it: the reference counts are those of Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_int32, c_void_p, sizeof
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakSet

import torch

from linspec.kernels.step_plan import PAGE, PageList
from linspec.state.entries import EntrySpec


class Page:
    """Entries of `count` positions from a multiple of PAGE on, in all layers of a state.

    keys [L, Hkv, count, K], and values [L, Hkv, count, V] behind them in memory.
    """

    __slots__ = ("__weakref__", "count", "keys", "values")

    @torch.inference_mode()
    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A copy of entries of 1 to PAGE positions."""
        self.count = keys.shape[2]
        both = keys.new_empty(keys.numel() + values.numel())
        self.keys = both[: keys.numel()].view(keys.shape).copy_(keys)
        self.values = both[keys.numel() :].view(values.shape).copy_(values)

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class PagedSnapshot:
    """What one slot has committed in L layers of a cache: its full pages, and a copy of what is behind them.

    rest_keys [L, Hkv, C, K], rest_values [L, Hkv, C, V].
    """

    spec: EntrySpec
    entries: str
    layers: int
    length: int
    pages: tuple[Page, ...]
    rest_keys: torch.Tensor
    rest_values: torch.Tensor
    base_position: ClassVar[int] = 0
    sums: ClassVar[None] = None

    @property
    def keys(self) -> torch.Tensor:
        """A copy of all of them, [L, Hkv, length, K]."""
        return torch.cat([*(page.keys for page in self.pages), self.rest_keys], dim=2)

    @property
    def values(self) -> torch.Tensor:
        """A copy of all of them, [L, Hkv, conv_history + length, V]: zeros, ahead of the first position."""
        layers, heads, _, width = self.rest_values.shape
        ahead = self.rest_values.new_zeros(layers, heads, self.spec.conv_history, width)
        return torch.cat([ahead, *(page.values for page in self.pages), self.rest_values], dim=2)


class PagePool:
    """The pages that were made of the entries of one state, as long as somebody has them."""

    def __init__(self) -> None:
        self._alive: WeakSet[Page] = WeakSet()

    def make(self, keys: torch.Tensor, values: torch.Tensor) -> Page:
        """A page with a copy of these entries."""
        page = Page(keys, values)
        self._alive.add(page)
        return page

    def __len__(self) -> int:
        return len(self._alive)

    @property
    def bytes(self) -> int:
        return sum(page.bytes for page in self._alive)


class PageTable:
    """The full pages that each slot begins with, as Python and the kernels find them."""

    def __init__(self, slots: int) -> None:
        self._pages: list[tuple[Page, ...]] = []
        self.grow(slots)

    def grow(self, slots: int) -> None:
        """Have `slots` more slots, without pages."""
        before = self._pages
        slots += len(before)
        self._pages = [()] * slots
        # as the kernels read them: how many positions they hold, and where each page is
        self.positions = (c_int32 * slots)()
        self._lists = (c_void_p * slots)()
        self._addresses = [(c_void_p * 0)()] * slots
        for slot, pages in enumerate(before):
            self.put(slot, pages)

    def __getitem__(self, slot: int) -> tuple[Page, ...]:
        return self._pages[slot]

    def put(self, slot: int, pages: Sequence[Page]) -> None:
        """Let `slot` begin with these pages."""
        self._pages[slot] = tuple(pages)
        found = (c_void_p * len(pages))(*(page.keys.data_ptr() for page in pages))
        self._addresses[slot] = found
        self._lists[slot] = addressof(found)
        self.positions[slot] = PAGE * len(pages)

    def seen_from(
        self, slot: int, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> PageList:
        """The pages of the slots from `slot` on, in one layer of a state with such buffers [L, slots, ..]."""
        layers, _, heads, _, key_width = keys.shape
        key_bytes, value_bytes = (
            PAGE * heads * width * keys.element_size() for width in (key_width, values.shape[-1])
        )
        return PageList(
            lists=addressof(self._lists) + sizeof(c_void_p) * slot,
            positions=addressof(self.positions) + sizeof(c_int32) * slot,
            keys=layer * key_bytes,
            values=layers * key_bytes + layer * value_bytes,
        )


def bytes_of(pages: Sequence[Page]) -> int:
    """Bytes of these pages, each of which counts once."""
    return sum(page.bytes for page in {id(page): page for page in pages}.values())
