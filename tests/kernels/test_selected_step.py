"""Attention to selected groups in one call: against the mixer's own form, and bit for bit against itself."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from kernels.test_native_step import assert_most_near, model

from linspec.decoding.step import StepInput
from linspec.kernels.cpu.library import instruction_sets
from linspec.mixers.config import MixerConfig
from linspec.mixers.paged import rounded_out
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.models.sparse import with_sparse_attention
from linspec.models.step_plan import why_not
from linspec.state.page_bounds import PageBounds
from linspec.state.sequence_states import SequenceStates

SPECS = {"two": "pages:budget=128,group=64,span=2", "wide": "pages:budget=256,group=128,span=3"}
TREE = [-1, 0, 0, 1, 3, 2, 4, 6, 7, 5]
KINDS = ["float", "int8", "int4", "bfloat16", "float16"]
IDS = torch.randint(97, (900,), generator=torch.Generator().manual_seed(0)).tolist()


def made_of(form: str, bits: int | None = 8) -> Decoder:
    if form == "by-head":
        own = MixerConfig(name="by-head", group=64, span=2, sinks=4, exact_heads=(0, 2, 3))
        own = replace(own, options={"exact": SPECS["two"]})
        return model("by-head", bits, mixers=(own,) * 3, heads=8, kv_heads=4)
    taps = 3 if form == "taps" else 0
    mixer = replace(make_mixer(SPECS.get(form, SPECS["two"])), taps=taps)
    return model("softmax", bits, mixers=(mixer, MixerConfig(taps=taps), mixer))


def read(made: Decoder, state: SequenceStates, slot: int, ids: list[int]) -> torch.Tensor:
    logits = made.step([StepInput(slot, ids)], state).logits
    state.commit(slot, range(len(ids)))
    return logits


def check_bounds(state: SequenceStates) -> int:
    """What is kept is what the entries say; returns of how many pages."""
    count = 0
    for part in state.parts:
        bounds: PageBounds | None = getattr(part, "bounds", None)
        if bounds is None:
            continue
        for slot, length in enumerate(part.lengths):
            copy = part.snapshot(slot)
            keys = part.entries.decode(copy.keys, part.spec.key_width, torch.float32)
            pages = keys[:, :, : length // 16 * 16].unflatten(2, (-1, 16))
            greatest, least = rounded_out(pages.amax(3), pages.amin(3))
            kept = bounds.of(slot, length)
            for layer, head in ((a, b) for a in range(len(keys)) for b in range(keys.shape[1])):
                have = int(bounds.counts[layer, slot, head])
                assert have <= length // 16
                count += have
                assert torch.equal(
                    kept[0][layer, head, :have].float(), greatest[layer, head, :have]
                )
                assert torch.equal(kept[1][layer, head, :have].float(), least[layer, head, :have])
    return count


def outputs(made: Decoder, kind: str, share: bool = True) -> list[torch.Tensor]:
    """A prompt in slices, trees beside a shorter slot, single tokens, what a fork goes on with."""
    state, found = made.new_state(3, kind), []
    for first, last in ((0, 300), (300, 317), (317, 700)):
        found.append(read(made, state, 0, IDS[first:last]))
    read(made, state, 1, IDS[:150])
    if share:
        state.fork(0, 2)
    for turn in range(3):
        new = [StepInput(slot, [slot + node + turn for node in range(10)], TREE) for slot in (0, 1)]
        found.append(made.step(new, state).logits)
        state.commit(0, [0, 2, 5, 9])
        state.commit(1, [0, 1])
    for token in range(3):
        found.append(read(made, state, 0, [token]))
    if share:
        found += [read(made, state, 2, IDS[:5]), read(made, state, 2, IDS[:70])]
    return found


@pytest.mark.parametrize("form", ["two", "wide", "taps", "by-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_selects_as_the_mixer_does(isa: str, form: str, kind: str) -> None:
    if kind != "float" and form not in ("two", "by-head"):
        return
    made, found = made_of(form, None), []
    assert made.native is not None
    native = made.native
    for each in (native, None):
        made.native = each
        found.append(outputs(made, kind))
    for one, other in zip(*found, strict=True):
        if kind == "int4":
            assert_most_near(one, other, 2e-3)
        else:
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("form", ["two", "wide", "by-head"])
def test_a_node_gets_the_same_bits_however_it_comes(isa: str, form: str) -> None:
    """Tokens of a chain: as one prompt, in slices, one by one beside others, as a path of a tree."""
    made = made_of(form)
    state = made.new_state(3, "int8")
    whole = read(made, state, 0, IDS[:600])
    parts = [read(made, state, 1, IDS[a:b]) for a, b in ((0, 130), (130, 400), (400, 590))]
    read(made, state, 2, IDS[100:500])
    # the path 0 1 3 4 6 7 8 of a tree beside another slot's
    tokens = [590, 591, 0, 592, 593, 0, 594, 595, 596, 0]
    tree = StepInput(1, [IDS[at] for at in tokens], TREE)
    logits = made.step([tree, StepInput(2, IDS[:10], TREE)], state).logits
    path = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(torch.cat([*parts, logits[path]]), whole[:597])
    state.commit(1, path)
    state.drop(2)
    rest = [read(made, state, 1, [IDS[at]]) for at in range(597, 600)]
    assert torch.equal(torch.cat(rest), whole[597:])


def test_bits_are_those_of_every_set_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of("two")
    assert made.native is not None
    from linspec.kernels.cpu.library import load

    library = load().library
    assert library is not None
    found = []
    try:
        for name in instruction_sets(library):
            assert library.ls_use_isa(name.encode())
            for threads in (1, 3):
                monkeypatch.setattr("linspec.kernels.cpu.step.native_threads", lambda n=threads: n)
                found.append(outputs(made, "int8"))
    finally:
        library.ls_use_isa(ctypes.c_char_p(load().name.encode()))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_those_of_the_entries_after_any_history(kind: str) -> None:
    made = made_of("two")
    state = made.new_state(3, kind)
    draw = torch.Generator().manual_seed(len(kind))
    counts = []
    for _ in range(40):
        what, slot, other = (int(n) for n in torch.randint(0, 3, (3,), generator=draw))
        size = int(torch.randint(1, 200, (1,), generator=draw))
        move = int(torch.randint(0, 8, (1,), generator=draw))
        if move < 4 and state.parts[0].lengths[slot] + size < 900:
            read(made, state, slot, IDS[what : what + size])
        elif move == 4:
            made.step([StepInput(slot, IDS[:10], TREE)], state)
            state.commit(slot, [0, 2, 5])
        elif move == 5:
            made.step([StepInput(slot, IDS[:10], TREE)], state)
            state.drop(slot)
        elif move == 6:
            state.fork(slot, other)
        elif what == 0:
            state.reset(slot)
        else:
            state.restore(other, state.snapshot(slot))
        counts.append(check_bounds(state))
    assert max(counts) > 100


def test_bytes_of_a_state_count_the_bounds() -> None:
    made = made_of("two")
    state = made.new_state(1)
    before = state.bytes_at(640)
    read(made, state, 0, IDS[:640])
    # of all layers of the cache: those that read everything share it
    elements = len(made.layers) * made.config.kv_heads * (640 // 16) * 2 * made.config.head_width
    assert state.bytes_at(640) - before == 2 * elements
    assert state.bytes(0) == state.bytes_at(640)


@pytest.mark.parametrize(
    "spec", ["pages:budget=64,group=64,span=1", "pages:group=32", "pages:group=128,page=32"]
)
def test_what_is_selected_otherwise_is_named_and_runs_by_layers(spec: str) -> None:
    made = with_sparse_attention(model("softmax", 8), spec)
    assert "groups are selected in the one-call step with a span of 2" in (why_not(made) or "")
