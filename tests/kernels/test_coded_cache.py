"""Softmax over rows of 8-bit and 4-bit codes: the C step against torch, trees against chains, bit for bit."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import nn

from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

TREE = [-1, 0, 0, 1, 3, 2, 4, 6, 7, 5]
TOKENS = [3 * node + 1 for node in range(len(TREE))]
WINDOW = MixerConfig(name="window", window=70)
KINDS = {"int8": torch.int8, "int4": torch.uint8}


def decoder(mixer: MixerConfig, *, width: int = 24, kv_heads: int = 2, layers: int = 2) -> Decoder:
    config = DecoderConfig(
        vocab_size=97,
        width=64,
        layers=layers,
        heads=4,
        kv_heads=kv_heads,
        head_width=width,
        mlp_width=88,
        mixers=(mixer,) * layers,
    )
    torch.manual_seed(0)
    return Decoder(config)


def whole(mixer: MixerConfig, width: int, key_scale: float = 1.0) -> Decoder:
    """One layer whose keys, queries and values are sums of ones: no order of addition rounds them."""
    made = decoder(mixer, width=width, layers=1)
    made = Decoder(replace(made.config, norm_eps=0.0))
    mixer_of = made.layers[0].mixer
    for linear in (made.embed, mixer_of.q, mixer_of.k, mixer_of.v):
        nn.init.normal_(linear.weight).data.sign_()
    # a power of two keeps sums exact, and scores so small that a softmax is not one row
    for linear in (mixer_of.q, mixer_of.k, mixer_of.v):
        linear.weight.data /= 8
    mixer_of.k.weight.data *= key_scale
    if mixer.taps:
        nn.init.normal_(made.layers[0].mixer.taps)
    return made.to_inference()


def read(model: Decoder, kind: str, length: int, slots: int = 1) -> SequenceStates:
    """A state that has read a text in chains that the one-call step takes."""
    state = model.new_state(slots, kind)
    ids = [index * 31 % 97 for index in range(length)]
    for first in range(0, length, 64):
        chain = ids[first : first + 64]
        model.step([StepInput(0, chain, all_logits=False)], state)
        state.commit(0, range(len(chain)))
    return state


@pytest.mark.crossed(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [24, 62, 80, 128])
@pytest.mark.parametrize("mixer", [MixerConfig(), MixerConfig(taps=5), WINDOW])
def test_every_instruction_set_meets_the_same_codes(
    isa: str, mixer: MixerConfig, width: int, kind: str
) -> None:
    """Equal codes leave only the rounding of floats; one other code would be a thousand times that."""
    model = whole(mixer, width)
    outputs = []
    native = model.native
    assert native is not None
    for form in (native, None):
        model.native = form
        state = read(model, kind, 139)
        model.step([StepInput(0, [7, 8, 9])], state)
        outputs.append(model.step([StepInput(0, [7, 8], [1, 3])], state).hidden)
    torch.testing.assert_close(*outputs, rtol=2e-6, atol=2e-6)


def test_what_float16_cannot_hold_is_no_number_in_both_forms(isa: str) -> None:
    """The blocks of keys and values that overflow say so, rather than being read as something else."""
    model = whole(MixerConfig(), 40, key_scale=2.0**20)
    native = model.native
    for form in (native, None):
        model.native = form
        assert model.step([StepInput(0, [7])], read(model, "int4", 3)).hidden.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", [MixerConfig(), WINDOW])
def test_a_tree_over_codes_is_verified_bit_for_bit(isa: str, mixer: MixerConfig, kind: str) -> None:
    model = decoder(mixer).to_inference()
    tree = read(model, kind, 187, slots=2)
    tree.fork(0, 1)
    together = model.step([StepInput(0, TOKENS, TREE), StepInput(1, [1])], tree).logits
    for path in ([0, 1, 3, 4, 6, 7, 8], [0, 2, 5, 9]):
        chain = model.new_state(1, kind)
        chain.restore(0, tree.snapshot(0))
        for node in path:
            logits = model.step([StepInput(0, [TOKENS[node]])], chain).logits
            chain.commit(0, [0])
            assert torch.equal(logits[0], together[node])


@pytest.mark.parametrize("kind", KINDS)
def test_a_committed_path_is_what_reading_it_leaves(library: ctypes.CDLL, kind: str) -> None:
    model = decoder(MixerConfig()).to_inference()
    path = [0, 2, 5, 9]
    tree, fresh = read(model, kind, 187), read(model, kind, 187)
    model.step([StepInput(0, TOKENS, TREE)], tree)
    tree.commit(0, path)
    model.step([StepInput(0, [TOKENS[node] for node in path])], fresh)
    fresh.commit(0, range(len(path)))
    for one, other in zip(tree.snapshot(0), fresh.snapshot(0), strict=True):
        assert one.keys.dtype == KINDS[kind]
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("kv", ["float", *KINDS])
def test_a_long_cache_is_the_same_on_one_thread_and_on_two(library: ctypes.CDLL, kv: str) -> None:
    """One kv head and several chunks: threads share the chunks of a head."""
    model = decoder(MixerConfig(), kv_heads=1, layers=1).to_inference()
    state = model.new_state(1, kv)
    ids = [index * 31 % 97 for index in range(2030)]
    model.step([StepInput(0, ids, all_logits=False)], state)
    state.commit(0, range(len(ids)))
    before, logits = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits.append(model.step([StepInput(0, TOKENS, TREE)], state).logits)
            state.drop(0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    model.native = None
    torch.testing.assert_close(
        model.step([StepInput(0, TOKENS, TREE)], state).logits, logits[0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_that_ends_inside_a_tree(library: ctypes.CDLL, kind: str) -> None:
    """Bits are those of plain decoding where ancestors begin a new chunk."""
    model = decoder(MixerConfig(), layers=1).to_inference()
    for length in (1020, 1023, 1024):
        tree = model.new_state(1, kind)
        model.step([StepInput(0, [index * 31 % 97 for index in range(length)])], tree)
        tree.commit(0, range(length))
        copy = tree.snapshot(0)
        together = model.step([StepInput(0, TOKENS, TREE)], tree).logits
        tree.restore(0, copy)
        for node in [0, 1, 3, 4, 6, 7, 8]:
            logits = model.step([StepInput(0, [TOKENS[node]])], tree).logits
            tree.commit(0, [0])
            assert torch.equal(logits[0], together[node])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_cache_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="no layer of this model keeps a softmax cache"):
        decoder(MixerConfig(name="local", group=8)).new_state(1, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_with_a_drafter_is_that_without(library: ctypes.CDLL, kind: str) -> None:
    prompt, params = "def area(width, height):\n    return width", SamplingParams(max_tokens=40)
    plain = LLM("embedded-softmax", max_batch=1, kv=kind)
    drafted = LLM("embedded-softmax", drafter="prompt-lookup", policy=6, max_batch=1, kv=kind)
    expected, found = plain.generate(prompt, params)[0], drafted.generate(prompt, params)[0]
    assert found.stats.accepted > 0
    assert found.token_ids == expected.token_ids


@pytest.mark.parametrize(("kind", "row"), [("int8", 64 + 4), ("int4", 40)])
def test_codes_take_a_quarter_or_a_sixth_of_the_memory(kind: str, row: int) -> None:
    model = decoder(MixerConfig(), width=64)
    assert read(model, kind, 90).bytes(0) == 2 * 2 * 2 * 90 * row
