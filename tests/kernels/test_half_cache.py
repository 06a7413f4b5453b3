"""Softmax over 16-bit rows: the C step against torch, trees and prompts against chains, bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch

from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import StepInput
from linspec.kernels.cpu.library import instruction_sets
from linspec.llm import LLM
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

TREE = [-1, 0, 0, 1, 3, 2, 4, 6, 7, 5]
TOKENS = [3 * node + 1 for node in range(len(TREE))]
IDS = [index * 31 % 97 for index in range(400)]
WINDOW = MixerConfig(name="window", window=70)
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def decoder(mixer: MixerConfig = WINDOW, *, width: int = 24) -> Decoder:
    config = DecoderConfig(
        vocab_size=97,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=width,
        mlp_width=88,
        mixers=(MixerConfig(), mixer),
    )
    torch.manual_seed(0)
    return Decoder(config).to_inference()


@pytest.mark.crossed(3)
@pytest.mark.parametrize("width", [24, 62, 128])
@pytest.mark.parametrize("mixer", [MixerConfig(taps=5), WINDOW])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_computes_the_step_by_layers(
    isa: str, kind: str, mixer: MixerConfig, width: int
) -> None:
    model, outputs = decoder(mixer, width=width), []
    native = model.native
    assert native is not None
    for form in (native, None):
        model.native = form
        state = model.new_state(1, kind)
        assert state.in_kernels
        prompt = model.step([StepInput(0, IDS[:139])], state)
        state.commit(0, range(139))
        tree = model.step([StepInput(0, TOKENS, TREE)], state)
        outputs.append(torch.cat((prompt.logits, tree.logits)))
        assert {part.keys.dtype for part in state.parts} == {KINDS[kind]}
    # a sum that is rounded in another order can fall into the next 16-bit number
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_stored_as_torch_rounds_them(isa: str, kind: str) -> None:
    model = decoder()
    exact, kept = model.new_state(), model.new_state(1, kind)
    for state in (exact, kept):
        model.step([StepInput(0, IDS[:50])], state)
        state.commit(0, range(50))
    # of the first layer, whose inputs are the same
    one, other = exact.snapshot(0)[0], kept.snapshot(0)[0]
    assert torch.equal(one.keys[0].to(KINDS[kind]), other.keys[0])
    assert torch.equal(one.values[0].to(KINDS[kind]), other.values[0])


def test_rows_of_one_kind_were_read_as_those_of_another_that_had_lain_there(
    library: ctypes.CDLL,
) -> None:
    model, first, second = decoder(), *(decoder().new_state(1, kind) for kind in KINDS)
    model.step([StepInput(0, IDS[:50])], first)
    for part, old in zip(second.parts, first.parts, strict=True):
        part.keys, part.values = (t.view(torch.float16) for t in (old.keys, old.values))
    found = model.step([StepInput(0, IDS[:50])], second).logits
    assert torch.equal(
        found, model.step([StepInput(0, IDS[:50])], model.new_state(1, "float16")).logits
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_and_a_prompt_get_the_bits_of_plain_decoding(isa: str, kind: str) -> None:
    model = decoder()
    tree, apart = model.new_state(1, kind), model.new_state(1, kind)
    whole = model.step([StepInput(0, IDS[:187])], tree).logits
    tree.commit(0, range(187))
    for place, token in enumerate(IDS[:187]):
        alone = model.step([StepInput(0, [token])], apart).logits
        apart.commit(0, [0])
        assert torch.equal(alone[0], whole[place])
    together = model.step([StepInput(0, TOKENS, TREE)], tree).logits
    for node in (0, 1, 3, 4, 6, 7, 8):
        alone = model.step([StepInput(0, [TOKENS[node]])], apart).logits
        apart.commit(0, [0])
        assert torch.equal(alone[0], together[node])


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_gives_the_same_bits(library: ctypes.CDLL, kind: str) -> None:
    model, before, results = decoder(), library.ls_isa(), []
    for name in instruction_sets(library):
        assert library.ls_use_isa(name.encode())
        state = model.new_state(1, kind)
        model.step([StepInput(0, IDS[:150])], state)
        state.commit(0, range(150))
        results.append(model.step([StepInput(0, TOKENS, TREE)], state).logits)
    assert library.ls_use_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_with_a_drafter_is_that_without(library: ctypes.CDLL, kind: str) -> None:
    prompt, params = "def area(width, height):\n    return width", SamplingParams(max_tokens=40)
    settings = {"max_batch": 1, "kv_cache_dtype": kind}
    plain = LLM("embedded-softmax", **settings)
    drafted = LLM("embedded-softmax", drafter="prompt-lookup", policy=6, **settings)
    expected, found = plain.generate(prompt, params)[0], drafted.generate(prompt, params)[0]
    assert found.stats.accepted > 0
    assert found.token_ids == expected.token_ids


def test_16_bits_take_half_of_the_memory() -> None:
    model = decoder(MixerConfig())
    sizes = []
    for kind in ("float", *KINDS):
        state = model.new_state(1, kind)
        model.step([StepInput(0, IDS[:90])], state)
        state.commit(0, range(90))
        sizes.append(state.bytes(0))
    assert sizes == [2 * sizes[1], sizes[1], sizes[1]]
