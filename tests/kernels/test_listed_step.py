"""Positions that layers select for later ones, in one call: against the mixer's own form, and bit for bit."""

from __future__ import annotations

import ctypes
from dataclasses import replace
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
from linspec.models.own_forms import skipping
from linspec.models.sparse import with_sparse_attention

LAYERS = 5
SPECS = {
    "usual": "tidal:budget=100,first=1,again=3",
    "small": "tidal:budget=11,group=8,span=1,first=0,again=0",
    "crooked": "tidal:budget=70,group=37,span=3,first=0,again=2",
    "taps": "tidal:budget=50,group=16,span=2,first=1,again=2,taps=3",
}
KINDS = ["float", "int8", "int4", "bfloat16", "float16"]
IDS = torch.randint(97, (1400,), generator=torch.Generator().manual_seed(0)).tolist()


def plain(bits: int | None, **shape: Any) -> Decoder:
    return model("softmax", bits, layers=LAYERS, mixers=(MixerConfig(),) * LAYERS, **shape)


def made_of(form: str, bits: int | None = 8, **shape: Any) -> Decoder:
    if form == "taps":
        mixer = make_mixer(SPECS[form])
        own = [
            replace(mixer, options={**mixer.options, "selects": selects})
            for selects in (True, True, False, False)
        ]
        return model("softmax", bits, layers=LAYERS, mixers=(MixerConfig(taps=3), *own), **shape)
    return with_sparse_attention(plain(bits, **shape), SPECS[form])


@pytest.mark.crossed(20)
@pytest.mark.parametrize("form", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_same_entries_both_forms_read_the_same(isa: str, form: str, kind: str) -> None:
    made = made_of(form, None)
    # queries and entries are rounded, and of two alike another may be selected
    near = None if kind == "float" else 5e-2
    check_forms_agree(made, made.new_state(1, kind), IDS, near)


@pytest.mark.crossed(9)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", SPECS)
def test_a_node_gets_the_same_bits_however_it_comes(isa: str, form: str, kind: str) -> None:
    made = made_of(form)
    check_ways_agree(made, made.new_state(3, kind), IDS)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("form", ["usual", "crooked"])
def test_bits_are_those_of_every_set_and_number_of_threads(
    library: ctypes.CDLL, form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(form, kv_heads=1)
    found = []
    try:
        for name in instruction_sets(library):
            assert library.ls_use_isa(name.encode())
            for threads in (1, 2, 3):
                monkeypatch.setattr("linspec.kernels.cpu.step.native_threads", lambda n=threads: n)
                state = made.new_state(2, kind)
                logits = [read(made, state, 0, IDS[:700]), read(made, state, 1, IDS[:70])]
                new = [StepInput(slot, IDS[:10], TREE) for slot in (0, 1)]
                found.append(torch.cat([*logits, made.step(new, state).logits]))
    finally:
        library.ls_use_isa(ctypes.c_char_p(load().name.encode()))
    assert len(found) > 3
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_cache_that_threads_share_is_selected_from_alike(
    isa: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One KV head and several chunks, of which the layer that selects reads all."""
    made, found = made_of("usual", kv_heads=1), []
    state = made.new_state(1, kind)
    read(made, state, 0, IDS)
    for threads in (1, 2, 3):
        monkeypatch.setattr("linspec.kernels.cpu.step.native_threads", lambda n=threads: n)
        found.append(made.step([StepInput(0, IDS[:10], TREE)], state).logits)
        state.drop(0)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", ["float", "bfloat16"])
def test_a_budget_of_everything_is_softmax(isa: str, kind: str) -> None:
    whole, logits = plain(8), []
    for form in (whole, with_sparse_attention(whole, "tidal:budget=900,first=1")):
        state = form.new_state(1, kind)
        prompt = read(form, state, 0, IDS[:300])
        logits.append(torch.cat((prompt, form.step([StepInput(0, IDS[:10], TREE)], state).logits)))
    # the same rows, in the same order but in other blocks
    torch.testing.assert_close(*logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "budgets", [(None, 20, 20), (20, 21, 20), (20, 20, None), (21, None, 20)], ids=str
)
def test_layers_that_read_what_nobody_selects_like_this_go_one_by_one(
    library: ctypes.CDLL, budgets: tuple[int | None, ...]
) -> None:
    """Budgets of a layer that selects and of two that read; None is a layer of softmax."""
    specs = [f"tidal:budget={budget},group=8,selects={i == 0}" for i, budget in enumerate(budgets)]
    mixers = tuple(
        MixerConfig() if budget is None else make_mixer(spec.lower())
        for budget, spec in zip(budgets, specs, strict=True)
    )
    reason = why_not(model("softmax", 8, mixers=mixers))
    if budgets == (20, 20, None):
        assert reason is None
    else:
        assert reason is not None and "behind a layer that selects as many" in reason


def test_a_model_that_skips_the_layer_that_selects_says_what_it_lacks(library: ctypes.CDLL) -> None:
    made = with_sparse_attention(plain(8), "tidal:budget=20,group=8,first=1,again=1")
    assert why_not(made) is None
    without = skipping(made, mixers={1}, mlps=set())
    assert "behind a layer that selects as many" in (why_not(without) or "")
    with pytest.raises(StateError, match="'tidal' reads what an earlier layer selects"):
        read(without, without.new_state(1), 0, IDS[:40])
