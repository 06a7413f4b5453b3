"""Pages of caches: any history of slots, snapshots and a prefix cache beside plain lists."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from guests import paged_state
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from state_bodies import LAYERS, SIZES, SLOTS

from linspec.decoding.step import MAX_STAGED
from linspec.decoding.tree import chain_shape
from linspec.engine.prefix_tree import Node, PageUses, as_tokens, match, pages_until, split
from linspec.state.contract import StateOptions
from linspec.state.entries import EntrySpec
from linspec.state.kv_cache import KVCache
from linspec.state.memory import clear, zeros
from linspec.state.pages import PAGE
from linspec.state.registry import STATES, new_cache

KINDS = ["float", "bfloat16", "float16", "int8", "int4"]
GUESTS = (paged_state,)
SLOT = st.integers(0, SLOTS - 1)
Entry = tuple[torch.Tensor, torch.Tensor]


def make(kind: str, *, paged: bool = True) -> Any:
    """A cache that kernels read, unless it is to have no pages."""
    made = new_cache(EntrySpec(**SIZES), LAYERS, SLOTS, StateOptions(torch.float32, kv_cache=kind))
    if paged:
        made.page_list(0)
    return made


def entries(body: Any, count: int, seed: int) -> list[Entry]:
    """Entries of `count` positions, as they are kept."""
    generator = torch.Generator().manual_seed(seed)
    widths = SIZES["key_width"], SIZES["value_width"]
    drawn = [
        body.entries.encode(
            torch.randn(LAYERS, SIZES["kv_heads"], count, width, generator=generator)
        )
        for width in widths
    ]
    return [(drawn[0][:, :, i], drawn[1][:, :, i]) for i in range(count)]


@torch.inference_mode()
def write(body: Any, slot: int, new: list[Entry]) -> None:
    """Stage entries behind the committed ones, where kernels do: a long chain in its own room."""
    at, count = body.lengths[slot] - body.table.positions[slot], len(new)
    if count > MAX_STAGED:
        rooms = body.room_aside(slot, count)
        assert rooms[0][0].data_ptr() == body.keys[0, slot].data_ptr()
    else:
        body.reserve(slot, count)
    first = body.spec.conv_history + at
    body.keys[:, slot, :, at : at + count] = stacked(new, 0, body.keys)
    body.values[:, slot, :, first : first + count] = stacked(new, 1, body.values)
    body.record(slot, chain_shape(count))


def stacked(held: list[Entry], which: int, like: torch.Tensor) -> torch.Tensor:
    if not held:
        return like[:, :, :0]
    return torch.stack([entry[which] for entry in held], dim=2)


class Histories(RuleBasedStateMachine):
    """Slots that begin, grow, fork, overwrite, roll back and end; snapshots; texts that are kept and go."""

    kind, paged = "float", True

    def __init__(self) -> None:
        super().__init__()
        self.body = make(self.kind, paged=self.paged)
        self.slots: list[list[Entry]] = [[] for _ in range(SLOTS)]
        self.copies: list[tuple[Any, list[Entry]]] = []
        self.kept: list[tuple[list[Any], list[Entry]]] = []

    @rule(slot=SLOT, count=st.integers(1, 64), taken=st.integers(0, 64), seed=st.integers(0, 99))
    def step(self, slot: int, count: int, taken: int, seed: int) -> None:
        new = entries(self.body, count, seed)
        write(self.body, slot, new)
        path = range(min(taken, count))
        self.body.commit(slot, path)
        self.slots[slot] += new[: len(path)]

    @rule(slot=SLOT, seed=st.integers(0, 99))
    def step_a_tree(self, slot: int, seed: int) -> None:
        new = entries(self.body, 4, seed)
        write(self.body, slot, new)
        self.body.commit(slot, [1, 3])
        self.slots[slot] += [new[1], new[3]]

    @rule(slot=SLOT, count=st.integers(65, 200), seed=st.integers(0, 99))
    def read_a_chain(self, slot: int, count: int, seed: int) -> None:
        new = entries(self.body, count, seed)
        write(self.body, slot, new)
        self.body.commit(slot, range(count))
        self.slots[slot] += new

    @rule(source=SLOT, to=SLOT)
    def fork(self, source: int, to: int) -> None:
        self.body.fork(source, to)
        self.slots[to] = list(self.slots[source])

    @rule(slot=SLOT)
    def end(self, slot: int) -> None:
        self.body.reset(slot)
        self.slots[slot] = []

    @rule()
    def let_kernels_read(self) -> None:
        self.body.page_list(0)

    @rule(slot=SLOT)
    def unshare(self, slot: int) -> None:
        self.body.unshare(slot)

    @rule(slot=SLOT, place=st.integers(0, 400), seed=st.integers(0, 99))
    def overwrite(self, slot: int, place: int, seed: int) -> None:
        if not self.slots[slot]:
            return
        place %= len(self.slots[slot])
        (entry,) = entries(self.body, 1, seed)
        decode, spec = self.body.entries.decode, self.body.spec
        k = decode(entry[0][:, :, None], spec.key_width, torch.float32)
        v = decode(entry[1][:, :, None], spec.value_width, torch.float32)
        for layer in range(LAYERS):
            self.body.overwrite(layer, slot, [place], k[layer], v[layer])
        again = self.body.entries.encode(k)[:, :, 0], self.body.entries.encode(v)[:, :, 0]
        self.slots[slot][place] = again

    @rule(slot=SLOT, count=st.integers(1, 70), seed=st.integers(0, 99))
    def lengthen(self, slot: int, count: int, seed: int) -> None:
        """Positions that are overwritten before they are read, and some that never are."""
        length = len(self.slots[slot])
        self.body.lengthen(slot, length + count)
        self.body.shorten(slot, length + 1)
        self.slots[slot].append(entries(self.body, 1, seed)[0])
        self.overwrite(slot, length, seed)

    @rule(slot=SLOT)
    def snapshot(self, slot: int) -> None:
        self.copies.append((self.body.snapshot(slot), list(self.slots[slot])))

    @rule(slot=SLOT, number=st.integers(0, 9))
    def restore(self, slot: int, number: int) -> None:
        if self.copies:
            copy, held = self.copies.pop(number % len(self.copies))
            self.body.restore(slot, copy)
            self.slots[slot] = list(held)

    @rule(slot=SLOT, less=st.integers(0, 70))
    def keep(self, slot: int, less: int) -> None:
        length = max(0, len(self.slots[slot]) - less)
        self.kept.append((self.body.pages(slot, 0, length), self.slots[slot][:length]))

    @rule(slot=SLOT, number=st.integers(0, 9), less=st.integers(0, 70))
    def begin(self, slot: int, number: int, less: int) -> None:
        if self.kept:
            pages, held = self.kept[number % len(self.kept)]
            length = max(0, len(held) - less)
            self.body.put_pages(slot, pages, length)
            self.slots[slot] = held[:length]

    @rule(number=st.integers(0, 9))
    def evict(self, number: int) -> None:
        if self.kept:
            self.kept.pop(number % len(self.kept))

    @invariant()
    def slots_hold_what_lists_say(self) -> None:
        body, history = self.body, SIZES["conv_history"]
        for slot, held in enumerate(self.slots):
            own = body.lengths[slot] - body.table.positions[slot]
            assert body.lengths[slot] == len(held) and own >= 0
            pages = body.table[slot]
            buffers = body.keys[:, slot, :, :own], body.values[:, slot, :, history : history + own]
            found = [
                torch.cat([*(getattr(page, name) for page in pages), buffer], dim=2)
                for name, buffer in zip(("keys", "values"), buffers, strict=True)
            ]
            assert torch.equal(found[0], stacked(held, 0, found[0]))
            assert torch.equal(found[1], stacked(held, 1, found[1]))
            assert not body.values[:, slot, :, :history].any()

    def teardown(self) -> None:
        while self.copies:
            copy, held = self.copies.pop()
            assert torch.equal(copy.keys, stacked(held, 0, copy.keys))
            values = copy.values[:, :, SIZES["conv_history"] :]
            assert torch.equal(values, stacked(held, 1, values))
            del copy
        for slot in range(SLOTS):
            self.body.reset(slot)
        self.kept.clear()
        gc.collect()
        assert not len(self.body.pool) and not self.body.pool.bytes


@pytest.mark.crossed(6)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paged", [True, False])
def test_any_history_is_that_of_plain_lists_and_leaves_no_page(kind: str, paged: bool) -> None:
    machine = type(f"Histories of {kind}", (Histories,), {"kind": kind, "paged": paged})
    machine.TestCase.settings = settings(
        max_examples=settings().max_examples * 3 // 4, stateful_step_count=25
    )
    machine.TestCase("runTest").runTest()


def test_every_kind_of_cache_is_tried() -> None:
    mine = {name for name in STATES.names() if issubclass(STATES[name], KVCache)}
    assert mine == set(KINDS)


def test_forks_share_full_pages_and_copy_what_is_behind_them() -> None:
    body = make("float")
    write(body, 0, entries(body, 60, 1))
    body.commit(0, range(60))
    write(body, 0, entries(body, 60, 2))
    body.commit(0, range(50))
    body.fork(0, 1)
    assert body.table[0] == body.table[1] and len(body.table[0]) == 1
    assert len(body.pool) == 1 and body.pool.bytes == body.entry_bytes(PAGE) - body.entry_bytes(0)
    copy = body.snapshot(1)
    body.reset(0)
    body.reset(1)
    assert len(body.pool) == 1 and copy.length == 110
    del copy
    assert not len(body.pool)


def test_a_state_that_no_kernel_reads_has_no_pages() -> None:
    """Its steps read buffers, which would have to be filled again."""
    body = new_cache(EntrySpec(**SIZES), LAYERS, SLOTS, StateOptions(torch.float64))
    k = torch.randn(1, SIZES["kv_heads"], 200, SIZES["key_width"], dtype=torch.float64)
    v = torch.randn(1, SIZES["kv_heads"], 200, SIZES["value_width"], dtype=torch.float64)
    for layer in range(LAYERS):
        body.stage_long(layer, 0, [200], k, v)
    body.record(0, chain_shape(200))
    body.commit(0, range(200))
    body.fork(0, 1)
    assert not body.table[0] and not body.table[1]
    keys, _ = body.read(1, slice(0, 2), 200)
    assert torch.equal(keys[0], keys[1]) and torch.equal(keys[0], k[0])


@pytest.mark.parametrize("count", [1, 100, 1 << 14, 100_003])
def test_what_is_cleared_is_zero_and_nothing_else(count: int) -> None:
    whole = zeros((3 * count,), torch.float32)
    whole.fill_(1.0)
    clear(whole[count : 2 * count][None])
    assert not whole[count : 2 * count].any()
    assert whole[:count].all() and whole[2 * count :].all()


# ---- the tree


def text(length: int) -> Any:
    return as_tokens(range(length))


@pytest.mark.parametrize("cuts", [(64,), (10,), (100, 30), (128, 64), (199, 1), (65, 64, 63)])
def test_edges_that_meet_within_a_page_both_have_it(cuts: tuple[int, ...]) -> None:
    body = make("float")
    write(body, 0, entries(body, 64, 0))
    body.commit(0, range(64))
    for seed in range(1, 5):
        write(body, 0, entries(body, 34, seed))
        body.commit(0, range(34))
    pages = [(page,) for page in body.pages(0, 0, 200)]
    root = Node(text(0), None)
    leaf = Node(text(200), root, pages, end=200)
    root.children[0] = leaf
    uses = PageUses()
    assert uses.add(leaf.pages) == body.pool.bytes
    for at in cuts:
        found = match(root, text(at))
        assert found.beyond is not None
        both, upper = found.beyond.pages, split(found.beyond, at - found.node.end)
        assert uses.add(upper.pages) == uses.add(found.beyond.pages) == uses.remove(both) == 0
    for length in range(1, 201, 13):
        assert pages_until(leaf, length) == pages[: -(-length // PAGE)]
    gone = [uses.remove(node.pages) for node in leaf.path()]
    assert sum(gone) == body.pool.bytes
