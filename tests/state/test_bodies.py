"""Every body of a state is the plain list of what was committed, whatever was staged and dropped."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_bodies import BODIES, CACHES, LAYERS, SIZES, SLOTS, WINDOW, Reference

from linspec.decoding.step import MAX_STAGED
from linspec.decoding.tree import chain_shape, shape_of
from linspec.errors import StateError
from linspec.state.window import WindowCache

every_body = pytest.mark.parametrize("name", BODIES)


def new_entries(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (
        torch.randn(
            count, LAYERS, SIZES["kv_heads"], width, generator=generator, dtype=torch.float64
        )
        for width in (SIZES["key_width"], SIZES["value_width"])
    )
    return list(zip(k, v, strict=True))


class History:
    """Random operations on a body and on its reference."""

    def __init__(self, name: str, seed: int) -> None:
        self.reference = Reference(BODIES[name]())
        self.body, self.rng = self.reference.body, random.Random(seed)

    def parents(self, slot: int) -> tuple[int, ...]:
        return tuple(self.body.staged[slot].parents)

    @torch.inference_mode()  # as steps do
    def stage(self, start: int, counts: list[int], *, long: bool = False) -> None:
        """Stage some nodes of slots start.. in every layer, as a forest, or as chains that are long."""
        slots = range(start, start + len(counts))
        new = [new_entries(n, self.rng.randrange(2**20)) for n in counts]
        shapes = []
        for slot, count in zip(slots, counts, strict=True):
            parents = list(self.parents(slot))
            for node in range(len(parents), len(parents) + count):
                parents.append(self.rng.randint(max(-1, node - 3), node - 1))
            shapes.append(chain_shape(count) if long else shape_of(tuple(parents)))
            self.body.reserve(slot, count)
        for layer in range(LAYERS):
            k, v = (self.packed(new, layer, which) for which in (0, 1))
            write = self.body.stage_long if long else self.body.stage
            write(layer, start, counts, k, v)
        for slot, shape, entries in zip(slots, shapes, new, strict=True):
            self.body.record(slot, shape)
            self.reference.staged[slot] += [
                (self.reference.kept(k), self.reference.kept(v)) for k, v in entries
            ]

    def packed(self, new: list[list[tuple[torch.Tensor, torch.Tensor]]], layer: int, which: int):
        """[R, Hkv, N, .] of one layer, NaN where a slot has fewer nodes."""
        widths = (SIZES["key_width"], SIZES["value_width"])
        shape = (len(new), SIZES["kv_heads"], max(map(len, new)), widths[which])
        found = torch.full(shape, torch.nan, dtype=torch.float64)
        for i, entries in enumerate(new):
            for n, entry in enumerate(entries):
                found[i, :, n] = entry[which][layer]
        return found

    def long(self, start: int, counts: list[int]) -> None:
        """Chains that are staged aside, and committed in part."""
        for slot in range(start, start + len(counts)):
            self.drop(slot)
        self.stage(start, counts, long=True)
        for slot, count in zip(range(start, start + len(counts)), counts, strict=True):
            self.commit_path(
                slot, list(range(self.rng.choice([0, count, self.rng.randint(0, count)])))
            )

    def commit(self, slot: int) -> None:
        parents, path = self.parents(slot), []
        if parents and self.rng.random() < 0.8:
            node = self.rng.randrange(len(parents))
            while node >= 0:
                path.insert(0, node)
                node = parents[node]
        self.commit_path(slot, path)

    def commit_path(self, slot: int, path: list[int]) -> None:
        staged = self.reference.staged[slot]
        self.reference.committed[slot] += [staged[node] for node in path]
        self.reference.staged[slot] = []
        self.body.commit(slot, path)

    def drop(self, slot: int) -> None:
        self.body.drop(slot)
        self.reference.staged[slot] = []

    def reset(self, slot: int) -> None:
        self.body.reset(slot)
        self.reference.committed[slot], self.reference.staged[slot] = [], []

    def copy(self, source: int, target: int, *, fork: bool) -> None:
        if fork:
            self.body.fork(source, target)
        else:
            self.body.restore(target, self.body.snapshot(source))
        if not fork or source != target:
            self.reference.staged[target] = []
        self.reference.committed[target] = list(self.reference.committed[source])

    def round(self) -> None:
        """One random operation."""
        rng, slot = self.rng, self.rng.randrange(SLOTS)
        counts = [rng.randint(1, 5) for _ in range(rng.randint(1, SLOTS - slot))]
        kind = rng.choice(["stage", "stage", "commit", "commit", "commit", "drop", "other"])
        if kind == "stage":
            self.stage(slot, counts)
        elif kind == "commit":
            self.commit(slot)
        elif kind == "drop":
            self.drop(slot)
        else:
            self.other(slot, counts)

    def other(self, slot: int, counts: list[int]) -> None:
        kind = self.rng.choice(["long", "reset", "fork", "restore"])
        if kind == "long":
            self.long(slot, [MAX_STAGED + n for n in counts])
        elif kind == "reset":
            self.reset(slot)
        else:
            self.drop(slot)
            self.copy(self.rng.randrange(SLOTS), slot, fork=kind == "fork")


@every_body
@settings(max_examples=settings().max_examples * 25 // 20)
@given(rounds=st.integers(1, 25), seed=st.integers(0, 2**20))
def test_a_history_of_rounds_equals_plain_lists(name: str, rounds: int, seed: int) -> None:
    history = History(name, seed)
    for _ in range(rounds):
        history.round()
        history.reference.check()


@torch.inference_mode()
def test_sums_depended_on_the_pieces_in_which_tokens_came() -> None:
    whole, cut = History("grouped", 9), History("grouped", 9)
    whole.stage(0, [5 * MAX_STAGED], long=True)
    whole.commit_path(0, list(range(5 * MAX_STAGED)))
    entries = whole.reference.committed[0]
    for first in range(0, len(entries), MAX_STAGED):
        piece = entries[first : first + MAX_STAGED]
        for layer in range(LAYERS):
            k, v = (torch.stack([e[which][layer] for e in piece], 1)[None] for which in (0, 1))
            cut.body.stage(layer, 0, [len(piece)], k, v)
        cut.body.record(0, chain_shape(len(piece)))
        cut.body.commit(0, range(len(piece)))
    for layer in range(LAYERS):
        found, expected = (each.body.read_sums(layer, slice(0, 1)) for each in (cut, whole))
        assert torch.equal(found, expected)


@every_body
@torch.inference_mode()
def test_a_long_chain_reads_back_at_once(name: str) -> None:
    history = History(name, 1)
    history.stage(1, [3])
    history.commit(1)
    history.body.drop(1)
    held, base = history.body.held(1), history.body.base_positions[1]
    new = new_entries(MAX_STAGED + 3, 2)
    keep = history.reference.kept
    k, v = (torch.stack([entry[which][0] for entry in new], 1)[None] for which in (0, 1))
    history.body.reserve(1, len(new))
    keys, values = history.body.stage_long(0, 1, [len(new)], k, v)
    assert torch.equal(keys[:, :, held:], keep(k))
    assert torch.equal(values[:, :, held + SIZES["conv_history"] :], keep(v))
    committed = history.reference.committed[1][base:]
    assert all(torch.equal(keys[0, :, i], entry[0][0]) for i, entry in enumerate(committed))


@every_body
def test_a_fork_and_its_source_do_not_write_into_each_other(name: str) -> None:
    history = History(name, 3)
    for _ in range(3):
        history.stage(0, [5])
        history.commit_path(0, [0])
    history.copy(0, 2, fork=True)
    for slot in (0, 2, 0):
        history.stage(slot, [4])
        history.reference.check()
        history.commit(slot)
        history.reference.check()


@every_body
def test_a_window_keeps_enough_and_no_body_too_much(name: str) -> None:
    history = History(name, 4)
    for _ in range(12):
        history.stage(0, [3])
        history.commit_path(0, [0])
        body = history.body
        if isinstance(body, WindowCache):
            assert min(body.lengths[0], WINDOW) <= body.held(0) <= 2 * WINDOW


@pytest.mark.parametrize("name", CACHES)
def test_committed_positions_can_be_overwritten(name: str) -> None:
    history = History(name, 5)
    history.stage(0, [6])
    history.commit_path(0, list(range(1)))
    history.long(0, [MAX_STAGED + 2])
    history.copy(0, 1, fork=True)
    history.stage(0, [2])
    length = len(history.reference.committed[0])
    at = [0, length - 1] if length > 1 else [0]
    new = new_entries(len(at), 6)
    for layer in range(LAYERS):
        k, v = (torch.stack([entry[which][layer] for entry in new], 1) for which in (0, 1))
        history.body.overwrite(layer, 0, at, k, v)
    keep = history.reference.kept
    for position, (k, v) in zip(at, new, strict=True):
        history.reference.committed[0][position] = (keep(k), keep(v))
    history.reference.check()
    with pytest.raises(StateError, match=r"positions \[\d+\] are not all committed in slot 0"):
        history.body.check_overwrite(0, [length])


@pytest.mark.parametrize("name", [name for name in BODIES if name not in CACHES])
def test_what_cannot_be_overwritten_is_refused_by_name(name: str) -> None:
    history = History(name, 7)
    history.stage(0, [2])
    history.commit_path(0, [0])
    k, v = torch.zeros(2, 1, 3), torch.zeros(2, 1, 4)
    with pytest.raises(StateError, match="cannot overwrite committed positions"):
        history.body.overwrite(0, 0, [0], k, v)
    with pytest.raises(StateError, match="cannot overwrite committed positions"):
        history.body.lengthen(0, 3)
    history.reference.check()


@every_body
def test_a_snapshot_of_another_body_is_refused(name: str) -> None:
    history = History(name, 8)
    history.stage(0, [2])
    history.commit_path(0, [0])
    for other in BODIES:
        mine, theirs = history.body, BODIES[other]()
        same = (type(mine.spec), mine.entries.name) == (type(theirs.spec), theirs.entries.name)
        if not same:
            with pytest.raises(StateError, match="does not fit"):
                mine.restore(0, theirs.snapshot(0))
    with pytest.raises(StateError, match="a snapshot of type str does not fit"):
        history.body.restore(0, "no snapshot")
    history.reference.check()
