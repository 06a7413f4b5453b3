"""Attention to selected groups in one call: against the mixer's own form, and bit for bit against itself."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.chains import check_ways_agree, read
from kernels.test_native_step import assert_most_near, model

from linspec.decoding.step import StepInput
from linspec.kernels.cpu.library import instruction_sets
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.models.one_call import why_not
from linspec.models.sparse import with_sparse_attention
from linspec.quantization.two_bit import encode
from linspec.state.judged_pages import JudgedPages
from linspec.state.sequence_states import SequenceStates

SPECS = {
    "two": "pages:budget=128,group=64,span=2",
    "wide": "pages:budget=256,group=128,span=3",
    "bounds": "pages:budget=128,group=64,span=2,judge=bounds",
    "wide bounds": "pages:budget=256,group=128,span=3,judge=bounds",
}
JUDGES = ["two", "bounds"]
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


def check_judges(state: SequenceStates) -> int:
    """What is kept is what the entries say; returns of how many pages."""
    found = [
        check_judge(state, part, judge)
        for part in state.parts
        for judge in getattr(part, "judges", {}).values()
    ]
    return sum(found)


def check_judge(state: SequenceStates, part: Any, judge: JudgedPages) -> int:
    count, size = 0, judge.page
    for slot, length in enumerate(part.lengths):
        copy = part.snapshot(slot)
        keys = part.entries.decode(copy.keys, part.spec.key_width, torch.float32)
        pages = keys[:, :, : length // size * size].unflatten(2, (-1, size))
        least, greatest, codes = encode(pages)
        kept = judge.bounds_of(slot, length)
        for layer, head in ((a, b) for a in range(len(keys)) for b in range(keys.shape[1])):
            have = int(judge.counts[layer, slot, head])
            assert have <= length // size
            count += have
            assert torch.equal(kept[0][layer, head, :have].float(), greatest[layer, head, :have])
            assert torch.equal(kept[1][layer, head, :have].float(), least[layer, head, :have])
            if judge.coded:
                found = judge.codes_of(slot, length)[layer, head, :have]
                assert torch.equal(found.float(), codes[layer, head, :have])
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


@pytest.mark.crossed(9)
@pytest.mark.parametrize("form", [*SPECS, "taps", "by-head"])
def test_one_call_selects_as_the_mixer_does(isa: str, form: str) -> None:
    made, found = made_of(form, None), []
    assert made.native is not None
    native = made.native
    for each in (native, None):
        made.native = each
        found.append(outputs(made, "float"))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.crossed(20)
@pytest.mark.parametrize("form", [*JUDGES, "wide", "by-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_same_entries_both_forms_select_the_same(isa: str, form: str, kind: str) -> None:
    """Entries that one form rounds another way than the other may be selected another way too."""
    made = made_of(form, None)
    native, state = made.native, made.new_state(1, kind)
    for first in range(0, 900, 60):
        # short enough that what is selected is committed
        new = [StepInput(0, IDS[first : first + 60]), StepInput(0, IDS[first : first + 10], TREE)]
        for step in new:
            before = state.snapshot(0)
            made.native = None
            found = made.step([step], state).logits
            state.drop(0)
            state.restore(0, before)
            made.native = native
            one = made.step([step], state).logits
            if kind == "int4" or (kind == "int8" and form == "by-head"):
                # near heads round what they read, so that a page at the border may be another one
                assert_most_near(one, found, 2e-2)
            else:
                torch.testing.assert_close(one, found, rtol=2e-3, atol=2e-3)
            state.commit(0, range(60)) if step is new[0] else state.drop(0)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("form", [*SPECS, "by-head"])
def test_a_node_gets_the_same_bits_however_it_comes(isa: str, form: str) -> None:
    made = made_of(form)
    check_ways_agree(made, made.new_state(3, "int8"), IDS)


@pytest.mark.parametrize("form", JUDGES)
def test_bits_are_those_of_every_set_and_number_of_threads(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(form)
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


@pytest.mark.crossed(5)
@pytest.mark.parametrize("form", JUDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_judged_by_their_entries_after_any_history(kind: str, form: str) -> None:
    made = made_of(form)
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
        counts.append(check_judges(state))
    assert max(counts) > (25 if form == "two" else 100)


@pytest.mark.parametrize("form", JUDGES)
def test_bytes_of_a_state_count_what_judges(form: str) -> None:
    made = made_of(form)
    state = made.new_state(1)
    before = state.bytes_at(640)
    read(made, state, 0, IDS[:640])
    # of all layers of the cache: those that read everything share it
    width, heads = made.config.head_width, len(made.layers) * made.config.kv_heads
    coded = 640 // 64 * -(-width // 16) * 16 * (4 + 64 // 4)
    judge = coded if form == "two" else 640 // 16 * 2 * 2 * width
    assert state.bytes_at(640) - before == heads * judge
    assert state.bytes(0) == state.bytes_at(640)


@pytest.mark.parametrize(
    "spec", ["pages:budget=64,group=64,span=1", "pages:group=32", "pages:group=128,page=32"]
)
def test_what_is_selected_otherwise_is_named_and_runs_by_layers(spec: str) -> None:
    made = with_sparse_attention(model("softmax", 8), spec)
    assert "groups are selected in the one-call step with a span of 2" in (why_not(made) or "")
