"""The one-call step over pages that slots share against the same step over one buffer, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.test_native_step import DISTANT, MIXERS, TREE, model

from linspec.decoding.step import StepInput
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.models.own_forms import near_sighted
from linspec.state.pages import PAGE
from linspec.state.sequence_states import SequenceStates

KINDS = ["float", "int8", "int4", "bfloat16", "float16"]
FORMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "by-head": {"heads": 8, "kv_heads": 4},
    "taps": {"mixers": (MixerConfig(taps=5),) * 3},
    "bias": DISTANT,
    "wide": {"head_width": 64},
    "delta": {"mixers": (MIXERS["delta"], MIXERS["delta-taps"], MIXERS["delta"])},
    "tidal": {
        "mixers": tuple(
            make_mixer(f"tidal:budget=40,group=8,span=2,selects={selects}")
            for selects in ("true", "false", "false")
        )
    },
}


def made_of(form: str) -> Decoder:
    if form == "by-head":
        exact = replace(MIXERS["by-head"], exact_heads=(0, 2))
        return model("by-head", 8, mixers=(exact, MixerConfig(), exact), **FORMS[form])
    return model("softmax", 8, **FORMS[form])


def read(made: Decoder, state: SequenceStates, slot: int, ids: list[int]) -> torch.Tensor:
    """Step and commit a chain."""
    logits = made.step([StepInput(slot, ids)], state).logits
    state.commit(slot, range(len(ids)))
    return logits


def pages_of(state: SequenceStates, slot: int) -> list[Any]:
    return state.held_pages(slot)


def outputs(made: Decoder, kind: str, prompt: int, share: bool) -> list[torch.Tensor]:
    """Two sequences of one prompt, which they share or have both read: trees, tokens, a further chain."""
    state = made.new_state(3, kind)
    ids = [index * 31 % 97 for index in range(prompt)]
    found = [read(made, state, 0, ids)]
    if share:
        state.fork(0, 2)
        held = pages_of(state, 2)
        assert held and all(
            one is other for one, other in zip(held, pages_of(state, 0), strict=True)
        )
    else:
        read(made, state, 2, ids)
        assert not pages_of(state, 0)
    for turn in range(3):
        new = [StepInput(slot, [slot + node + turn for node in range(10)], TREE) for slot in (0, 2)]
        found.append(made.step(new, state).logits)
        state.commit(0, [0, 2, 5, 9])
        state.commit(2, [0, 1])
    found.append(read(made, state, 2, ids[:90]))
    if share:
        # what one has written since then is in pages of its own
        state.fork(2, 1)
        state.fork(0, 0)
        first, *others = (pages_of(state, slot) for slot in (0, 1, 2))
        assert others[0] == others[1] and others[0][0] is first[0]
        assert len(others[0]) > len(first)
    else:
        state.restore(1, state.empty(1).snapshot(0))
        read(made, state, 1, ids)
        for turn in range(3):
            made.step([StepInput(1, [2 + node + turn for node in range(10)], TREE)], state)
            state.commit(1, [0, 1])
        read(made, state, 1, ids[:90])
    last = [StepInput(slot, [3 + slot]) for slot in (0, 1, 2)]
    return [*found, made.step(last, state).logits]


@pytest.mark.crossed(24)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prompt", [PAGE, 3 * PAGE + 7])
def test_pages_give_the_bits_of_one_buffer(isa: str, form: str, kind: str, prompt: int) -> None:
    made = made_of(form)
    shared, apart = (outputs(made, kind, prompt, share) for share in (True, False))
    for one, other in zip(shared, apart, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit_of_pages(kind: str) -> None:
    """Chunks of one kv head are shared out, and some of them lie in pages."""
    made = model("softmax", 8, heads=4, kv_heads=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outputs(made, kind, 700, share=True))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(each, found[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_one_by_one_read_what_was_in_pages(kind: str) -> None:
    """A step through some layers has no kernel: it takes the pages of its slot over, and of no other."""
    made = made_of("softmax")
    state, ids = made.new_state(2, kind), [index * 31 % 97 for index in range(200)]
    read(made, state, 0, ids)
    state.fork(0, 1)
    expected = made.step([StepInput(0, [5])], state).logits
    state.drop(0)
    found = made.step([StepInput(0, [5])], state, layers=range(3)).logits
    tolerance = 2e-2 if kind in ("int8", "int4") else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not pages_of(state, 0) and len(pages_of(state, 1)) == 200 // PAGE
    state.drop(0)
    again = made.step([StepInput(slot, [5]) for slot in (0, 1)], state).logits
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [200, 256, 190])
def test_a_form_that_sees_windows_has_room_for_what_comes_back_from_pages(
    kind: str, prompt: int
) -> None:
    """It reads buffers: its new nodes stand behind all rows there, in a tree and in a long chain."""
    made = made_of("softmax")
    near = near_sighted(made, group=16, span=2, sinks=3)
    assert made.native is not None and near.native is not None
    ids, found = [index * 31 % 97 for index in range(prompt)], []
    for share in (True, False):
        state = made.new_state(2, kind)
        read(made, state, 0, ids)
        if share:
            state.fork(0, 1)
        assert bool(pages_of(state, 0)) is share
        outputs = []
        for new in (StepInput(0, list(range(10)), TREE), StepInput(0, ids[:90])):
            outputs.append(near.step([new], state).logits)
            state.drop(0)
            outputs.append(made.step([StepInput(0, [5])], state).logits)
            state.drop(0)
        part = state.parts[0]
        assert part.keys.shape[3] >= part.lengths[0] + len(TREE)
        found.append(outputs)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
