"""Far keys as rebuilt from their changes, in one call: against the mixer's own form, and bit for bit."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.chains import check_forms_agree, check_ways_agree, read
from kernels.test_native_step import TREE, model

from linspec.decoding.step import StepInput
from linspec.kernels.cpu.library import instruction_sets, load
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.models.one_call import why_not
from linspec.models.sparse import with_sparse_attention

SPECS = {
    "usual": "delta:threshold=0.4",
    "small": "delta:threshold=0.3,group=8,span=1",
    "crooked": "delta:threshold=0.5,group=37,span=3",
    # a group begins many blocks, and more than a chunk, ahead of the rows that a thread reads
    "long": "delta:threshold=0.4,group=1500,span=1",
}
KINDS = ["float", "int8", "int4", "bfloat16", "float16"]
NEAR = {"int8": 2e-2, "int4": 0.15, "bfloat16": 5e-3, "float16": 5e-3}
IDS = torch.randint(97, (2200,), generator=torch.Generator().manual_seed(0)).tolist()


def made_of(form: str, bits: int | None = 8, **shape: Any) -> Decoder:
    if form == "by-head":
        own = MixerConfig(name="by-head", group=64, span=2, sinks=4, exact_heads=(0, 2, 3))
        own = replace(own, options={"exact": SPECS["small"]})
        return model("by-head", bits, mixers=(own,) * 3, heads=8, kv_heads=4)
    mixer = make_mixer(SPECS[form])
    return model("softmax", bits, mixers=(mixer, MixerConfig(), mixer), **shape)


@pytest.mark.crossed(20)
@pytest.mark.parametrize("form", [*SPECS, "by-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_same_entries_both_forms_read_the_same(isa: str, form: str, kind: str) -> None:
    made = made_of(form, None)
    # what is staged may be rounded the other way, and so pass the threshold
    near = NEAR.get(kind)
    check_forms_agree(made, made.new_state(1, kind), IDS, near)


@pytest.mark.crossed(9)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [*SPECS, "by-head"])
def test_a_node_gets_the_same_bits_however_it_comes(isa: str, form: str, kind: str) -> None:
    made = made_of(form)
    check_ways_agree(made, made.new_state(3, kind), IDS)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("form", ["crooked", "long"])
def test_bits_are_those_of_every_set_and_number_of_threads(
    library: ctypes.CDLL, form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One KV head and several chunks: threads begin inside groups and chunks."""
    made = made_of(form, kv_heads=1, max_positions=4096)
    state = made.new_state(2, kind)
    read(made, state, 0, IDS)
    read(made, state, 1, IDS[:70])
    found = []
    try:
        for name in instruction_sets(library):
            assert library.ls_use_isa(name.encode())
            for threads in (1, 2, 3):
                monkeypatch.setattr("linspec.kernels.cpu.step.native_threads", lambda n=threads: n)
                new = [StepInput(slot, IDS[:10], TREE) for slot in (0, 1)]
                found.append(made.step(new, state).logits)
                state.drop(0)
                state.drop(1)
    finally:
        library.ls_use_isa(ctypes.c_char_p(load().name.encode()))
    assert len(found) > 3
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["float", "bfloat16", "float16"])
def test_without_a_threshold_a_step_has_the_bits_of_softmax(isa: str, kind: str) -> None:
    made, logits = model("softmax", 8, mixers=(MixerConfig(),) * 3), []
    for form in (made, with_sparse_attention(made, "delta:threshold=0,group=16,span=2")):
        state = form.new_state(1, kind)
        prompt = read(form, state, 0, IDS[:300])
        logits.append(torch.cat((prompt, form.step([StepInput(0, IDS[:10], TREE)], state).logits)))
    assert torch.equal(*logits)


def test_a_threshold_changes_what_a_step_reads(isa: str) -> None:
    made, logits = model("softmax", 8, mixers=(MixerConfig(),) * 3), []
    for spec in ("delta:threshold=0", "delta:threshold=0.4"):
        form = with_sparse_attention(made, spec)
        assert why_not(form) is None
        state = form.new_state(1)
        read(form, state, 0, IDS[:300])
        logits.append(read(form, state, 0, [5]))
    assert (logits[0] - logits[1]).abs().max() > 1e-3
