"""Closed segments of low rank in one call: against the mixer's own form, and bit for bit."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.chains import check_forms_agree, check_ways_agree, read
from kernels.test_native_step import TREE, model

from linspec.decoding.step import StepInput
from linspec.errors import StateError
from linspec.kernels.cpu.library import instruction_sets, load
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.models.one_call import why_not
from linspec.models.sparse import with_sparse_attention
from linspec.state.sequence_states import SequenceStates
from linspec.state.shadow import ShadowState

SPECS = {
    "usual": "shadow:group=64,rank=16,budget=48",
    # chunks that fill no block of rows, several outliers, and a third segment that is whole
    "crooked": "shadow:group=66,span=3,rank=21,budget=40,chunk=6,outliers=2",
    "everything": "shadow:group=64,rank=48,budget=2000,chunk=32,outliers=0",
    "outliers": "shadow:group=72,rank=9,budget=0,chunk=24,outliers=2,taps=3",
    "by-head": "shadow:group=64,rank=16,budget=48",
}
KINDS = ["float", "int8", "int4", "bfloat16", "float16"]
PLACES = ["memory", "file"]
IDS = torch.randint(97, (1100,), generator=torch.Generator().manual_seed(0)).tolist()


def made_of(form: str, bits: int | None = 8, **shape: Any) -> Decoder:
    if form == "by-head":
        mixer = MixerConfig(name="by-head", group=16, span=2, sinks=4, exact_heads=(0, 2))
        mixer = replace(mixer, options={"exact": SPECS[form]})
        return model("by-head", bits, mixers=(mixer,) * 3, heads=12, kv_heads=4)
    mixer = make_mixer(SPECS[form])
    return model("softmax", bits, mixers=(mixer, MixerConfig(), mixer), **shape)


@pytest.fixture(params=PLACES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where values of closed segments go; None: they stay in memory."""
    return tmp_path if request.param == "file" else None


def shadow_of(state: SequenceStates) -> ShadowState:
    return next(part for part in state.parts if isinstance(part, ShadowState))


@pytest.mark.crossed(40)
@pytest.mark.parametrize("form", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_same_entries_both_forms_read_the_same(
    isa: str, form: str, kind: str, folder: Path | None
) -> None:
    made = made_of(form, None)
    # queries and entries are rounded, and of two alike another may be selected
    near = None if kind == "float" else 5e-2
    check_forms_agree(made, made.new_state(1, kind, offload=folder), IDS, near)


@pytest.mark.crossed(40)
@pytest.mark.parametrize("form", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_node_gets_the_same_bits_however_it_comes(
    isa: str, form: str, kind: str, folder: Path | None
) -> None:
    made = made_of(form)
    check_ways_agree(made, made.new_state(3, kind, offload=folder), IDS)


@pytest.mark.crossed(4)
@pytest.mark.parametrize("form", ["usual", "crooked"])
def test_nodes_behind_a_segment_that_closes_in_a_tree_keep_their_bits(
    isa: str, form: str, folder: Path | None
) -> None:
    made = made_of(form)
    size = shadow_of(made.new_state()).spec.group
    for held in (4 * size - 1, 4 * size - 3, 5 * size):
        state = made.new_state(2, offload=folder)
        read(made, state, 0, IDS[:held])
        read(made, state, 1, IDS[: held - 40])
        together = made.step([StepInput(slot, IDS[:10], TREE) for slot in (0, 1)], state).logits
        state.drop(0)
        for path in ([0, 1, 3, 4, 6, 7, 8], [0, 2, 5, 9]):
            alone = made.step([StepInput(0, [IDS[node] for node in path])], state).logits
            assert torch.equal(alone, together[path])
            state.drop(0)
        for node in (0, 1, 3, 4, 6, 7, 8):
            assert torch.equal(read(made, state, 0, [IDS[node]])[0], together[node])


@pytest.mark.crossed(8)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", SPECS)
def test_a_commit_is_a_fresh_prefill_to_the_bit(
    library: ctypes.CDLL, form: str, kind: str, folder: Path | None
) -> None:
    """What is kept after drafts that were accepted and refused is what the accepted text alone leaves."""
    made = made_of(form)
    state, text = made.new_state(2, kind, offload=folder), IDS[:120]
    read(made, state, 0, text)
    for turn in range(30):
        tokens = [(5 * node + turn) % 97 for node in range(10)]
        path = [0, 1, 3, 4, 6, 7, 8][: 1 + turn % 7]
        made.step([StepInput(0, tokens, TREE)], state)
        state.commit(0, path)
        text = [*text, *(tokens[node] for node in path)]
    read(made, state, 1, text)
    part = shadow_of(state)
    one, other = part.snapshot(0), part.snapshot(1)
    assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    for mine, theirs in zip(one.past, other.past, strict=True):
        assert mine.segments == theirs.segments > 0
        assert all(torch.equal(mine.kept[name], theirs.kept[name]) for name in mine.kept)
        if part.file is not None:
            rows = torch.arange(mine.chunks * part.spec.kv_heads)
            assert torch.equal(*(part.file.read(each.regions, rows) for each in (mine, theirs)))


@pytest.mark.parametrize(("form", "kind"), [("usual", "int8"), ("crooked", "float")])
def test_bits_are_those_of_every_set_and_number_of_threads(
    library: ctypes.CDLL, form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(form)
    found = []
    try:
        for name in instruction_sets(library):
            assert library.ls_use_isa(name.encode())
            for threads in (1, 2, 3):
                monkeypatch.setattr("linspec.kernels.cpu.step.native_threads", lambda n=threads: n)
                state = made.new_state(2, kind)
                logits = [read(made, state, 0, IDS[:400]), read(made, state, 1, IDS[:70])]
                new = [StepInput(slot, IDS[:10], TREE) for slot in (0, 1)]
                found.append(torch.cat([*logits, made.step(new, state).logits]))
    finally:
        library.ls_use_isa(ctypes.c_char_p(load().name.encode()))
    assert len(found) > 3
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["float", "bfloat16"])
def test_everything_of_full_rank_is_softmax(isa: str, kind: str) -> None:
    plain = model("softmax", None, mixers=(MixerConfig(),) * 3)
    logits = []
    for form in (plain, with_sparse_attention(plain, SPECS["everything"])):
        state = form.new_state(1, kind)
        prompt = read(form, state, 0, IDS[:300])
        logits.append(torch.cat((prompt, form.step([StepInput(0, IDS[:10], TREE)], state).logits)))
    near = 1e-4 if kind == "float" else 3e-2
    torch.testing.assert_close(*logits, rtol=near, atol=near)


@pytest.mark.parametrize(
    "options", [{"group": 32}, {"span": 1}, {"rank": 513, "group": 1024}], ids=str
)
def test_segments_that_a_tree_can_close_go_layer_by_layer(
    library: ctypes.CDLL, options: dict[str, int]
) -> None:
    sizes = {"group": 64, "rank": 8, "budget": 16} | options
    spec = "shadow:" + ",".join(f"{name}={value}" for name, value in sizes.items())
    wide = model("softmax", 8, mixers=(make_mixer(spec),) * 3, kv_heads=4, head_width=160)
    assert "segments close in the one-call step with a span of 2 or more" in (why_not(wide) or "")
    assert why_not(made_of("usual")) is None


# ---- what closes ahead of a step


def count_folds(made: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each segment that a layer closes."""
    folds: list[int] = []
    for block in (made.layers[0], made.layers[2]):
        fold: Callable[..., Any] = block.mixer.fold
        monkeypatch.setattr(
            block.mixer, "fold", lambda *args, fold=fold: (folds.append(1), fold(*args))[1]
        )
    return folds


def test_every_segment_closes_once(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a prompt that goes on behind it, in trees that cross its end, and in the commit that does."""
    made = made_of("usual")
    folds = count_folds(made, monkeypatch)
    state = made.new_state()
    # two layers, and three of five segments
    read(made, state, 0, IDS[: 5 * 64 - 2])
    assert len(folds) == 2 * 3
    for _ in range(3):
        made.step([StepInput(0, IDS[:10], TREE)], state)
        state.drop(0)
    assert len(folds) == 2 * 4
    read(made, state, 0, IDS[:5])
    assert len(folds) == 2 * 4 and shadow_of(state).past[0][0].segments == 4


def test_what_a_refused_chain_closed_is_forgotten(library: ctypes.CDLL) -> None:
    made = made_of("usual")
    state = made.new_state(2)
    read(made, state, 0, IDS[:100])
    made.step([StepInput(0, IDS[100:400])], state)
    state.drop(0)
    other = [*IDS[:100], *IDS[500:900]]
    found = [read(made, state, 0, other[100:]), read(made, state, 0, [5])]
    expected = [read(made, state, 1, other)[100:], read(made, state, 1, [5])]
    assert all(map(torch.equal, found, expected))


def test_part_of_a_chain_can_be_committed(library: ctypes.CDLL) -> None:
    made = made_of("usual")
    state = made.new_state(2)
    made.step([StepInput(0, IDS[:400])], state)
    state.commit(0, range(230))
    assert torch.equal(read(made, state, 0, IDS[230:300]), read(made, state, 1, IDS[:300])[230:])


# ---- values in a file


def test_a_file_that_grows_is_read_where_it_is_mapped_then(
    library: ctypes.CDLL, tmp_path: Path
) -> None:
    made = made_of("usual")
    apart, within = made.new_state(3, offload=tmp_path), made.new_state(3)
    for state in (apart, within):
        for slot, length in enumerate((700, 1100, 1100)):
            read(made, state, slot, IDS[:length])
    file = shadow_of(apart).file
    assert file is not None and file.bytes > 64 * file.region_bytes
    found, expected = (read(made, state, 0, IDS[:3]) for state in (apart, within))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chain", [1, 200])
def test_a_file_that_something_cut_is_a_named_error(
    library: ctypes.CDLL, tmp_path: Path, chain: int
) -> None:
    made = made_of("usual")
    state = made.new_state(offload=tmp_path)
    read(made, state, 0, IDS[:300])
    file = shadow_of(state).file
    assert file is not None and made.native is not None
    os.truncate(file._file.fileno(), 100)
    with pytest.raises(StateError, match="has 100 bytes and was made with"):
        made.step([StepInput(0, IDS[:chain])], state)


@pytest.mark.parametrize("chain", [4, 200])
def test_a_full_disk_is_a_named_error_and_leaves_the_slot_as_it_was(
    library: ctypes.CDLL, tmp_path: Path, chain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a tree, or a chain, closes a segment in one layer and then no more."""
    made = made_of("usual")
    state, other = made.new_state(offload=tmp_path), made.new_state()
    for each in (state, other):
        read(made, each, 0, IDS[:190])
    writes, pwrite = [], os.pwrite

    def full(fd: int, data: memoryview, at: int) -> int:
        writes.append(at)
        if len(writes) > 1:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, at)

    with monkeypatch.context() as patch:
        patch.setattr("linspec.state.offload.os.pwrite", full)
        with pytest.raises(StateError, match=r"do not fit into .*No space left on device"):
            made.step([StepInput(0, IDS[190 : 190 + chain])], state)
        state.drop(0)
    found, expected = (read(made, each, 0, IDS[190:500]) for each in (state, other))
    assert torch.equal(found, expected)
