"""A KV cache that grows with the sequence: every committed position keeps its entry."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar

import torch

from linspec.decoding.step import MAX_STAGED
from linspec.errors import StateError
from linspec.kernels.step_plan import PAGE, PageList
from linspec.state.branches import Places
from linspec.state.buffer import BufferState
from linspec.state.contract import StateOptions
from linspec.state.entries import EntryFormat, EntrySpec
from linspec.state.judged_pages import JudgedPages
from linspec.state.memory import check_growth
from linspec.state.pages import Page, PagedSnapshot, PagePool, PageTable
from linspec.state.registry import STATES


@STATES.register(
    "float",
    summary="keys and values in the dtype of the model, in pages as far as they are shared",
    paper="Vaswani et al. 2017, arXiv 1706.03762; Kwon et al. 2023, arXiv 2309.06180",
)
class KVCache(BufferState):
    """Nothing ever leaves, so committed entries can be overwritten, and long chains are staged in place.

    A slot that nobody shares anything with has all its entries in its buffer. When a copy of it is asked for
    (fork, snapshot, prefix cache), its full pages leave the buffer, and all who have the copy share them with
    the slot; its buffer has the entries behind them. Kernels read both. Whoever writes into pages, or reads
    entries layer by layer, has them back in its buffer first: see `unshare`.
    """

    grows: ClassVar[bool] = True

    def __init__(
        self,
        spec: EntrySpec,
        layers: int,
        slots: int,
        options: StateOptions,
        entries: EntryFormat | None = None,
    ) -> None:
        super().__init__(spec, layers, slots, options, entries)
        # where branches lie, and what those of an open step have overwritten, each with those before it
        self.places = Places()
        self.branches: dict[int, list[frozenset[int]]] = {}
        self.pool, self.table = PagePool(), PageTable(slots)
        # whether slots have pages: from when on kernels read them
        self.pages_read = False
        # for kernels that select what they read: by codes (True), or by bounds
        self.judges: dict[bool, JudgedPages] = {}

    def _resting(self) -> int:
        return MAX_STAGED

    def _own(self, slot: int) -> int:
        return self.lengths[slot] - self.table.positions[slot]

    def reserve(self, slot: int, new: int) -> None:
        super().reserve(slot, new)
        for judge in self.judges.values():
            judge.ensure(self.lengths[slot] + len(self.staged[slot]) + new)

    def room_aside(self, slot: int, new: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self._ensure(self._next(slot) + new)
        for judge in self.judges.values():
            judge.ensure(self.lengths[slot] + new)
        self.long[slot] = []
        return list(zip(self.keys[:, slot], self.values[:, slot], strict=True))

    # ---- what judges pages

    def keep_judge(self, coded: bool) -> None:
        """From now on kernels find room for what judges pages, codes or bounds, beside the entries."""
        if coded not in self.judges:
            spec, positions = self.spec, max(self.lengths) + 2 * MAX_STAGED
            self.judges[coded] = JudgedPages(
                *(self.layers, len(self.lengths), spec.kv_heads, spec.key_width, positions),
                coded=coded,
            )

    def _changed(self, slot: int, first: int = 0, end: int | None = None) -> None:
        """Take note that committed entries of `slot` change, none of them before `first` or from `end` on."""
        if slot < len(self.lengths):
            for judge in self.judges.values():
                judge.forget(slot, first)

    # ---- pages

    def page_list(self, layer: int, first: int = 0) -> PageList:
        """Where kernels find the pages of the slots from `first` on, in one layer."""
        self.pages_read = True
        return self.table.seen_from(first, self.keys, self.values, layer)

    def pages(self, slot: int, start: int, stop: int) -> list[Page]:
        """The pages that positions start..stop of `slot` are in, from that of `start` on.

        The last one may have fewer positions than PAGE, but has those before `stop`.
        """
        self._share(slot)
        held, found = self.table[slot], []
        for number in range(start // PAGE, -(-stop // PAGE)):
            first = PAGE * number
            if number < len(held):
                found.append(held[number])
            else:
                found.append(self._page(slot, first, min(stop, first + PAGE)))
        return found

    def put_pages(self, slot: int, pages: Sequence[Page], length: int) -> None:
        """Make `slot` the sequence of `length` positions whose entries are in these pages."""
        full, rest = divmod(length, PAGE)
        keys, values = self._buffered(slot, 0, 0)
        if rest:
            keys, values = pages[full].keys[:, :, :rest], pages[full].values[:, :, :rest]
        self._put(slot, pages[:full], keys, values)

    def _put(
        self, slot: int, pages: Sequence[Page], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Make `slot` the sequence of these pages, and of entries behind them."""
        self.reset(slot)
        self.table.put(slot, pages)
        self.lengths[slot] = PAGE * len(pages)
        if not self.pages_read:
            self.unshare(slot)
        at, rest = self._own(slot), keys.shape[2]
        self._ensure(at + rest)
        self._write(slot, at, keys, values)
        self.lengths[slot] += rest

    def unshare(self, slot: int) -> None:
        """Have all entries of `slot` in its buffer, a copy of those in pages."""
        pages = self.table[slot]
        if not pages:
            return
        first, count = PAGE * len(pages), self._next(slot)
        keys, values = _copied(self._buffered(slot, 0, count))
        self._ensure(first + count)
        self.table.put(slot, ())
        for number, page in enumerate(pages):
            self._write(slot, PAGE * number, page.keys, page.values)
        self._write(slot, first, keys, values)

    @torch.inference_mode()
    def _share(self, slot: int) -> None:
        """Let the full pages of `slot` leave its buffer, so that others can have them too."""
        held = self.table[slot]
        gone = self._own(slot) // PAGE * PAGE
        # what is staged, or branches off, lies behind or over entries where they are
        busy = self.staged[slot] or slot in self.long or slot in self.branches
        if not gone or not self.pages_read or busy:
            return
        first, length = PAGE * len(held), self.lengths[slot]
        made = [self._page(slot, at, at + PAGE) for at in range(first, first + gone, PAGE)]
        keys, values = _copied(self._buffered(slot, gone, length - first))
        self._clear(slot)
        self.table.put(slot, (*held, *made))
        self._write(slot, 0, keys, values)

    def _page(self, slot: int, start: int, stop: int) -> Page:
        """A page of positions start..stop, which are in the buffer."""
        first = self.table.positions[slot]
        return self.pool.make(*self._buffered(slot, start - first, stop - first))

    def _buffered(self, slot: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the buffer of `slot`."""
        history = self.spec.conv_history
        keys = self.keys[:, slot, :, start:stop]
        return keys, self.values[:, slot, :, history + start : history + stop]

    @torch.inference_mode()
    def _write(self, slot: int, at: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write into the buffer of `slot`."""
        to_keys, to_values = self._buffered(slot, at, at + keys.shape[2])
        to_keys.copy_(keys)
        to_values.copy_(values)

    # ---- slots

    @torch.inference_mode()
    def snapshot(self, slot: int) -> PagedSnapshot:
        """What `slot` has committed: its pages, which it shares from now on, and a copy of the rest."""
        self._share(slot)
        rest = _copied(self._buffered(slot, 0, self._own(slot)))
        pages, length = self.table[slot], self.lengths[slot]
        return PagedSnapshot(self.spec, self.entries.name, self.layers, length, pages, *rest)

    def restore(self, slot: int, copy: Any) -> None:
        self.check(copy)
        if isinstance(copy, PagedSnapshot):
            self._put(slot, copy.pages, copy.rest_keys, copy.rest_values)
        else:
            super().restore(slot, copy)

    def reset(self, slot: int) -> None:
        self.table.put(slot, ())
        self._forget_places(slot)
        self._changed(slot)
        super().reset(slot)

    def hold(self, slot: int, length: int) -> None:
        self.reset(slot)
        self._ensure(length)
        self.lengths[slot] = length

    def lengthen(self, slot: int, length: int) -> None:
        self.unshare(slot)
        self._ensure(length)
        self.lengths[slot] = length

    @torch.inference_mode()
    def shorten(self, slot: int, length: int) -> None:
        self.unshare(slot)
        self._forget_places(slot)
        self._changed(slot, length)
        end, history = self.lengths[slot], self.spec.conv_history
        self.lengths[slot] = length
        # as after `reset`: nothing that a zero weight keeps alive
        self.keys[:, slot, :, length:end] = 0
        self.values[:, slot, :, history + length : history + end] = 0

    # ---- entries

    def stage(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._unshare_all(range(start, start + len(lengths)))
        super().stage(layer, start, lengths, k, v)

    def stage_long(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._unshare_all(range(start, start + len(lengths)))
        return super().stage_long(layer, start, lengths, k, v)

    def read(self, layer: int, slots: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._unshare_all(range(*slots.indices(len(self.lengths))))
        return super().read(layer, slots, width)

    def _unshare_all(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self.unshare(slot)

    def bytes_at(self, length: int) -> int:
        beside = sum(judge.bytes_at(length) for judge in self.judges.values())
        return super().bytes_at(length) + beside

    def missing_bytes(self, length: int) -> int:
        missing = sum(judge.missing_bytes(length) for judge in self.judges.values())
        for entries in (self.keys, self.values):
            have = entries.shape[3]
            missing += max(0, length - have) * (entries.nbytes // have)
        return missing

    def check_overwrite(self, slot: int, positions: Sequence[int]) -> None:
        length = self.lengths[slot]
        if not all(0 <= position < length for position in positions):
            raise StateError(
                f"positions {list(positions)} are not all committed in slot {slot}, which has {length}; "
                "overwrite committed positions, and stage new ones"
            )

    @torch.inference_mode()
    def overwrite(
        self, layer: int, slot: int, positions: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Replace the entries at committed positions by k, v [Hkv, N, .]."""
        self.check_overwrite(slot, positions)
        self.unshare(slot)
        self._replace(layer, slot, positions, k, v)

    def _replace(
        self, layer: int, slot: int, positions: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write k, v into the buffer of `slot`, which has all its entries."""
        self._changed(slot, min(positions, default=0), max(positions, default=-1) + 1)
        at = torch.tensor(positions, dtype=torch.long, device=self.device)
        self.keys[layer, slot].index_copy_(1, at, self.entries.encode(k))
        history = self.spec.conv_history
        self.values[layer, slot].index_copy_(1, at + history, self.entries.encode(v))

    # ---- branches

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self.branches.pop(slot, None)

    def open_branches(
        self, slot: int, rows: Sequence[Sequence[int]], places: Sequence[int]
    ) -> None:
        if places:
            self._open(slot, rows, places)
        self.places.overwritten(slot, [row for each in rows for row in each])

    @torch.inference_mode()
    def _open(self, slot: int, rows: Sequence[Sequence[int]], numbers: Sequence[int]) -> None:
        """Make the places of branches what `slot` holds, but for what the step is to write."""
        length = self.lengths[slot]
        self.unshare(slot)
        self._have_slots(1 + max(numbers), length)
        places = self.places.give(slot, numbers)
        written = [frozenset(rows[0])]
        for place, more in zip(places, rows[1:], strict=True):
            written.append(written[-1].union(more))
            self._copy(slot, place.number, place.missing(length, written[-1]))
            place.held, place.differs = length, set()
        self.branches[slot] = written

    def _have_slots(self, slots: int, length: int) -> None:
        """Have room for so many slots, of which the new ones take `length` positions each."""
        more = slots - self.keys.shape[1]
        if more <= 0:
            return
        check_growth(more * self.bytes_at(length), length, self.device)
        self.keys = self._grown(self.keys, 0, more)
        self.values = self._grown(self.values, 0, more)
        self.table.grow(more)

    def _used(self, slot: int) -> int:
        if slot < len(self.lengths):
            return super()._used(slot)
        place = self.places.by_number.get(slot)
        return 0 if place is None else self.spec.conv_history + place.held

    def _copy(
        self, source: int, target: int, positions: Collection[int], layers: slice = slice(None)
    ) -> None:
        """Copy entries at `positions` of one slot to another, as they are kept."""
        if not positions:
            return
        first, last = min(positions), max(positions) + 1
        self._changed(target, first, last)
        # blocks are runs, which are copied as they lie
        run = last - first == len(positions)
        at = None if run else torch.tensor(sorted(positions), device=self.device)
        for entries, history in ((self.keys, 0), (self.values, self.spec.conv_history)):
            to, taken = entries[layers, target], entries[layers, source]
            if at is None:
                lie = slice(history + first, history + last)
                to[:, :, lie] = taken[:, :, lie]
            else:
                to.index_copy_(2, at + history, taken.index_select(2, at + history))

    @torch.inference_mode()
    def _forget_places(self, slot: int) -> None:
        """Nothing that was copied of `slot` is true any more; the memory goes back."""
        for place in self.places.of(slot):
            if place.held:
                self._clear(place.number)
            place.forget()

    @torch.inference_mode()
    def overwrite_branch(
        self,
        layer: int,
        slot: int,
        branch: int,
        positions: Sequence[int],
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `overwrite` behind branch `branch - 1`, in a place of its own; returns what `read` would."""
        places = [slot, *(place.number for place in self.places.of(slot))]
        before, mine = places[branch - 1], places[branch]
        left = self.branches[slot][branch - 1].difference(positions)
        self._copy(before, mine, left, slice(layer, layer + 1))
        self._replace(layer, mine, positions, k, v)
        return self.read(layer, slice(mine, mine + 1), self.lengths[slot])

    @torch.inference_mode()
    def keep_branch(self, slot: int, branch: int) -> None:
        """Overwrite what branch number `branch` has, and forget all of them."""
        if branch:
            number = self.places.of(slot)[branch - 1].number
            self._copy(number, slot, self.branches[slot][branch])
        self.branches.pop(slot, None)


def _copied(entries: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = entries
    return keys.clone(), values.clone()
