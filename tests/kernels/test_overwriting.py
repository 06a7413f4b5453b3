"""Nodes that overwrite in one call: by layers, alone and in batches, on every set and thread count.

A history is a canvas that is computed whole, then subset after subset of its positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.step import StepInput, StepOutput, Want
from linspec.decoding.tree import shape_of
from linspec.errors import ConfigError, ContextOverflow, InputError, StateError
from linspec.kernels.cpu.library import instruction_sets, load
from linspec.kernels.step_plan import NewNodes
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.linear import Quantizer
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.one_call import why_not
from linspec.state.sequence_states import SequenceStates

VOCAB, MASK = 61, 60
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "width": 64,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 24,
    "mlp_width": 88,
}
# as LLaDA and Dream have them, and what else a decoder may have
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"head_width": 32},
    "qwen2": {"qkv_bias": True, "kv_heads": 1, "tied_embeddings": True},
    "normed": {"qk_norm": True, "kv_heads": 4, "norm": "layer", "activation": "gelu"},
}
GROUPS: dict[str, Any] = {"group": 16, "span": 2}
# and one whose tokens see no later block, and some with sums over far groups beside an exact layer
DENOISERS = VARIANTS | {
    "blocks": VARIANTS["normed"] | {"block_length": 7},
    "aug": VARIANTS["qwen2"]
    | {
        "mixers": (
            MixerConfig(name="aug", taps=5, kernel="softmax", **GROUPS),
            MixerConfig(),
            MixerConfig(name="aug", taps=70, group=9),
        )
    },
    "relu": VARIANTS["normed"]
    | {
        "mixers": (
            MixerConfig(name="relu", **GROUPS),
            MixerConfig(),
            MixerConfig(name="hedgehog", taps=3, **GROUPS),
        )
    },
}
CACHES = ("float", "bfloat16", "float16", "int8", "int4")
# weights and entries in floats differ by the order of sums; a code that rounds the other way shows more
CLOSE = {"float": 1e-4, "bfloat16": 2e-2, "float16": 2e-2, "int8": 2e-2, "int4": 2e-2}
# of the logits' norm: codes of activations that round the other way
QUANTIZED = 0.1


@cache
def denoiser(variant: str = "llama", bits: int | None = None, **changes: Any) -> MaskedDiffusion:
    torch.manual_seed(0)
    config = DiffusionConfig(**SHAPE | {"mask_id": MASK} | DENOISERS[variant] | changes)
    made = MaskedDiffusion(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            # both are 0 at first
            if name.endswith(("alpha", "taps")):
                weight.normal_(0.0, 0.3)
    found = made.to_inference(Quantizer(bits, {})) if bits else made.to_inference()
    assert isinstance(found, MaskedDiffusion)
    return found


@cache
def causal(variant: str = "llama", bits: int | None = None, **changes: Any) -> Decoder:
    """The same weights in a model that reads from left to right."""
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(**SHAPE | VARIANTS[variant] | changes)).eval()
    return made.to_inference(Quantizer(bits, {})) if bits else made.to_inference()


def over(slot: int, positions: Sequence[int], seed: int, **more: Any) -> StepInput:
    """Tokens that follow from a seed, at these positions."""
    tokens = [(seed * 17 + position * 31) % VOCAB for position in positions]
    return StepInput(slot, tokens, overwrite=positions, causal=False, **more)


def held(model: Decoder, kv: str, *lengths: int) -> SequenceStates:
    """A state whose slots hold canvases that were computed whole, in one step."""
    state = model.new_state(len(lengths), kv)
    for slot, length in enumerate(lengths):
        state.hold(slot, length)
    model.step([over(slot, range(length), slot) for slot, length in enumerate(lengths)], state)
    return state


def kept(state: SequenceStates, slot: int) -> list[torch.Tensor]:
    return [tensor for part in state.snapshot(slot) for tensor in (part.keys, part.values)]


def by_layers(model: Decoder, inputs: Sequence[StepInput], state: SequenceStates) -> StepOutput:
    native, model.native = model.native, None
    try:
        return model.step(inputs, state)
    finally:
        model.native = native


# ---- histories


@st.composite
def histories(draw: st.DrawFn, longest: int = 150) -> tuple[list[int], list[list[StepInput]]]:
    """Lengths of canvases, and steps of some of them, whose rows come in any order."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    steps = []
    for number in range(draw(st.integers(1, 3))):
        slots = draw(st.sets(st.sampled_from(range(len(lengths))), min_size=1))
        steps.append([_drawn(draw, slot, lengths[slot], number) for slot in sorted(slots)])
    return lengths, steps


def _drawn(draw: st.DrawFn, slot: int, length: int, number: int) -> StepInput:
    random = draw(st.randoms(use_true_random=False))
    count = draw(st.integers(1, length))
    positions = random.sample(range(length), count)
    wanted = sorted(random.sample(range(count), random.randint(1, count)))
    return over(slot, positions, slot + 7 * number + 1, logits_of=wanted)


def outputs(
    model: Decoder, kv: str, lengths: Sequence[int], steps: Sequence[Sequence[StepInput]]
) -> list[torch.Tensor]:
    """Logits of every step, and what is left in the state."""
    state = held(model, kv, *lengths)
    logits = [model.step(inputs, state).logits for inputs in steps]
    return [*logits, *(tensor for slot in range(len(lengths)) for tensor in kept(state, slot))]


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@settings(max_examples=12)
@given(histories(80), st.sampled_from(list(DENOISERS)), st.sampled_from([None, 8, 4]), st.data())
def test_histories_have_the_same_bits_on_every_set_and_thread_count(
    history: tuple[list[int], list[list[StepInput]]],
    variant: str,
    bits: int | None,
    data: st.DataObject,
) -> None:
    library, kv = load().library, data.draw(st.sampled_from(CACHES))
    if library is None:
        pytest.skip(load().reason)
    model, before = denoiser(variant, bits), library.ls_isa()
    expected = outputs(model, kv, *history)
    threads = torch.get_num_threads()
    try:
        for name in instruction_sets(library):
            assert library.ls_use_isa(name.encode())
            for count in (1, 2):
                torch.set_num_threads(count)
                assert same(outputs(model, kv, *history), expected), (name, count)
    finally:
        torch.set_num_threads(threads)
        assert library.ls_use_isa(before)


@settings(max_examples=settings().max_examples * 2)
@given(histories(), st.sampled_from(list(DENOISERS)), st.sampled_from([None, 8, 4]), st.data())
def test_histories_are_those_by_layers(
    history: tuple[list[int], list[list[StepInput]]],
    variant: str,
    bits: int | None,
    data: st.DataObject,
) -> None:
    lengths, steps = history
    model, kv = denoiser(variant, bits), data.draw(st.sampled_from(CACHES))
    native, found = model.native, []
    for form in (native, None):
        model.native = form
        try:
            found.append(outputs(model, kv, lengths, steps)[: len(steps)])
        finally:
            model.native = native
    for one, other in zip(*found, strict=True):
        if bits is None:
            torch.testing.assert_close(one, other, rtol=CLOSE[kv], atol=CLOSE[kv])
        else:
            assert float((one - other).norm() / other.norm()) < QUANTIZED


@settings(max_examples=settings().max_examples * 2)
@given(histories(), st.sampled_from(list(DENOISERS)), st.sampled_from([None, 8, 4]), st.data())
def test_a_canvas_gets_the_bits_that_it_gets_alone(
    history: tuple[list[int], list[list[StepInput]]],
    variant: str,
    bits: int | None,
    data: st.DataObject,
) -> None:
    """And each position those that it gets when it is computed once more: nothing else has changed."""
    lengths, steps = history
    model, kv = denoiser(variant, bits), data.draw(st.sampled_from(CACHES))
    state, alone = held(model, kv, *lengths), [held(model, kv, *lengths) for _ in lengths]
    for inputs in steps:
        output = model.step(inputs, state)
        for given_one, rows in zip(inputs, output.slices, strict=True):
            apart = model.step([given_one], alone[given_one.slot])
            assert torch.equal(apart.logits, output.logits[rows])
            assert torch.equal(apart.hidden, output.hidden[rows])
    last = data.draw(st.sampled_from(steps[-1]))
    assert last.overwrite is not None and last.logits_of is not None
    before, rows = kept(state, last.slot), output.slices[steps[-1].index(last)]
    for number, at in list(enumerate(last.logits_of))[:5]:
        one = replace(
            last, tokens=[last.tokens[at]], overwrite=[last.overwrite[at]], logits_of=None
        )
        assert torch.equal(model.step([one], state).logits[0], output.logits[rows][number])
    assert same(kept(state, last.slot), before)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kv", CACHES)
def test_the_last_position_gets_the_bits_of_a_token_behind_all_others(
    isa: str, kv: str, bits: int | None
) -> None:
    """A model that reads from left to right has its weights, and finds the same rows."""
    for variant, length in zip(VARIANTS, (1, 65, 128), strict=True):
        model, reader = denoiser(variant, bits), causal(variant, bits)
        state, read = held(model, kv, length), reader.new_state(1, kv)
        read.restore(0, state.snapshot(0))
        for part in read.parts:
            part.lengths[0] = length - 1
        found = model.step([over(0, [length - 1], 5)], state)
        staged = StepInput(0, over(0, [length - 1], 5).tokens)
        assert torch.equal(found.logits, reader.step([staged], read).logits)
        read.commit(0, [0])
        assert same(kept(read, 0), kept(state, 0))


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_a_canvas_of_several_chunks(library: ctypes.CDLL, kv: str) -> None:
    """Threads share out the chunks of a long cache, or the pieces of many positions."""
    model, results = denoiser(layers=1, kv_heads=1), []
    inputs = [over(0, [1399, 3, 1024, 77], 3)], [over(0, range(100, 1300), 4)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = held(model, kv, 1400)
            results.append([model.step(each, state).logits for each in inputs])
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])
    state = held(model, kv, 1400)
    for each, found in zip(inputs, results[0], strict=True):
        torch.testing.assert_close(
            by_layers(model, each, state).logits, found, rtol=1e-3, atol=1e-3
        )


# ---- beside what is staged


def test_a_causal_model_takes_every_kind_of_input_in_one_step(isa: str) -> None:
    """Each gets the bits that it gets alone."""
    model = causal("qwen2")
    ids = [index * 31 % VOCAB for index in range(90)]

    def text() -> SequenceStates:
        state = model.new_state(4)
        for slot in range(4):
            model.step([StepInput(slot, ids[: 20 + slot])], state)
            state.commit(slot, range(20 + slot))
        return state

    inputs = [
        over(0, [19, 3, 4], 1, logits_of=[0, 2]),
        StepInput(1, [1, 2, 3], [-1, 0, 0]),
        StepInput(2, ids, all_logits=False),
        replace(over(3, [5, 22], 2), causal=True),
    ]
    state = text()
    together = model.step(inputs, state)
    assert [len(state.staged(slot)) for slot in range(4)] == [0, 3, 90, 0]
    for each, rows in zip(inputs, together.slices, strict=True):
        assert torch.equal(model.step([each], text()).logits, together.logits[rows])
    layered = by_layers(model, inputs, text())
    for one, other in zip(layered.slices, together.slices, strict=True):
        pair = layered.logits[one], together.logits[other]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_states_of_layers_and_given_embeddings(isa: str) -> None:
    model, want = denoiser(), Want((2, 0))
    embeddings = torch.randn(70, SHAPE["width"], generator=torch.Generator().manual_seed(0))
    native, found = model.native, []
    for form in (native, None):
        model.native = form
        inputs = [over(0, range(70), 1, embeddings=embeddings), over(1, [4, 2], 2)]
        found.append(model.step(inputs, held(model, "float", 80, 9), want=want))
    model.native = native
    one, other = found
    assert one.nodes == other.nodes and sorted(one.layers) == [0, 2]
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    for layer in (0, 2):
        torch.testing.assert_close(one.layers[layer], other.layers[layer], rtol=1e-4, atol=1e-4)


def test_a_step_without_logits_still_writes(library: ctypes.CDLL) -> None:
    model = denoiser()
    states = [held(model, "float", 9) for _ in range(2)]
    given_none = over(0, [1, 2], 3, logits_of=[])
    assert len(model.step([given_none], states[0]).logits) == 0
    assert len(by_layers(model, [given_none], states[1]).logits) == 0
    for one, other in zip(kept(states[0], 0), kept(states[1], 0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"overwrite": [1, 9]}, StateError, "not all committed in slot 0, which has 9"),
        ({"overwrite": [-1, 2]}, StateError, "not all committed"),
        ({"overwrite": [2, 2]}, ConfigError, "a position of its own"),
        ({"overwrite": [1, 2, 3]}, ConfigError, "2 tokens to overwrite positions"),
        ({"overwrite": [1, 2.0]}, ConfigError, "whole numbers"),
        ({"overwrite": torch.tensor([1, 1])}, ConfigError, "whole numbers"),
        ({"tokens": [1, VOCAB]}, InputError, "not all in 0..60"),
        ({"logits_of": [2]}, ConfigError, "logits of tokens .* count from 0 to 1"),
        ({"logits_of": [-1]}, ConfigError, "logits of tokens"),
        ({"embeddings": torch.zeros(2, 63)}, InputError, "width 64"),
    ],
    ids=str,
)
def test_what_is_malformed_is_refused_before_it_is_read(
    library: ctypes.CDLL, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = denoiser()
    state = held(model, "float", 9)
    before = kept(state, 0)
    with pytest.raises(error, match=message):
        model.step([replace(over(0, [1, 2], 3), **changes)], state)
    assert same(kept(state, 0), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"overwrite": [1, 9]},
        {"overwrite": [-1, 0]},
        {"overwrite": [1, 1]},
        {"overwrite": [1]},
        {"positions": [0, -1]},
        {"positions": [0]},
        {"tokens": [1]},
        {"committed": [9, 1]},
    ],
    ids=str,
)
def test_the_kernel_itself_refuses_rows_that_a_slot_has_not(
    library: ctypes.CDLL, changes: dict[str, Any]
) -> None:
    model = denoiser()
    state, native = held(model, "float", 9), model.native
    assert native is not None
    native.place(state)
    nodes = {"tokens": [1, 2], "positions": [1, 2], "committed": [9], "overwrite": [1, 2]}
    with pytest.raises(StateError, match=r"cannot overwrite rows .* of slot 0, which has \d"):
        native.kernel.run_over([NewNodes(slot=0, shape=shape_of(()), **nodes | changes)], [0])


def test_a_step_of_several_kinds_is_checked_before_any_of_it_runs(library: ctypes.CDLL) -> None:
    model = causal(max_positions=100)
    state = model.new_state(2)
    for slot in (0, 1):
        model.step([StepInput(slot, [1, 2, 3])], state)
        state.commit(slot, range(3))
    for wrong, error in (
        (StepInput(1, [1] * 98), ContextOverflow),
        (over(1, [3], 0), StateError),
        (over(0, [2], 0), ConfigError),
    ):
        with pytest.raises(error):
            model.step([StepInput(0, [4, 5]), wrong], state)
        assert not len(state.staged(0)) and not len(state.staged(1))


# ---- which models


@pytest.mark.parametrize(
    "changes",
    [
        {"mixers": (MixerConfig(taps=3),) * 3},
        {"positions": "relative", "relative": RelativeConfig()},
    ],
    ids=["taps", "relative"],
)
def test_what_weighs_by_distance_overwrites_layer_by_layer(
    library: ctypes.CDLL, changes: dict[str, Any]
) -> None:
    reader = causal(**changes)
    assert reader.native is not None
    state = reader.new_state()
    reader.step([StepInput(0, list(range(20)))], state)
    state.commit(0, range(20))
    other = reader.new_state()
    other.restore(0, state.snapshot(0))
    inputs = [over(0, [3, 19, 7], 1)]
    assert torch.equal(reader.step(inputs, state).logits, by_layers(reader, inputs, other).logits)
    model = denoiser(**changes)
    # where tokens see both ways a convolution is centred
    assert (model.native is not None) == (reader.config.mixers[0].taps > 0)
    assert model.native or "see no later tokens" in str(why_not(model))
