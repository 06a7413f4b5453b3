"""T5 against transformers' own implementation; its decoder's steps, trees and lossless drafts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_same_bytes, path_tokens, random_tree, randomise
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from linspec.checkpoints.hub import load_causal_model, load_model, load_seq2seq, save_model
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import StepInput
from linspec.drafters.lookup import LookupOptions, PromptLookup
from linspec.drafters.medusa import Medusa
from linspec.engine.engine import Engine
from linspec.errors import (
    CheckpointError,
    ConfigError,
    DrafterError,
    InputError,
    StateError,
    UnsupportedModel,
)
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from linspec.models.t5 import T5
from linspec.policies.costs import measure
from linspec.policies.fixed import Fixed
from linspec.verifiers.greedy import GreedyVerifier

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
KINDS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def save(kind: str, folder: Path) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SIZES, **KINDS[kind])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.3)
    model.save_pretrained(folder)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(61, (3, 30), generator=generator)
    target = torch.randint(61, (3, 27), generator=generator)
    return source, target, torch.arange(30) < torch.tensor([30, 9, 1])[:, None]


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_transformers(kind: str, side: str, tmp_path: Path) -> None:
    theirs, ours = save(kind, tmp_path), load_seq2seq(tmp_path)
    source, target, mask = batch()
    mask = mask if side == "right" else mask.flip(1)
    expected = theirs(source, attention_mask=mask.long(), decoder_input_ids=target).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(source, target, mask), expected, rtol=0, atol=1e-4)


@every_kind
def test_saving_back_gives_transformers_the_same_model(kind: str, tmp_path: Path) -> None:
    theirs = save(kind, tmp_path / "theirs")
    save_model(load_seq2seq(tmp_path / "theirs"), None, tmp_path / "ours")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    ours, original = again.state_dict(), theirs.state_dict()
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[key], original[key]) for key in ours)
    assert again.config.scale_decoder_outputs == (kind == "v1.0")
    files = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("ours", "theirs")]
    assert files[0] == files[1]


@torch.no_grad()
def test_an_output_matrix_of_its_own_is_kept(tmp_path: Path) -> None:
    save("v1.1", tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    own = torch.randn(tensors["shared.weight"].shape)
    save_file(tensors | {"lm_head.weight": own}, path, metadata={"format": "pt"})
    model = load_seq2seq(tmp_path / "theirs")
    assert torch.equal(model.decoder.head.weight, own)
    save_model(model, None, tmp_path / "ours")
    assert torch.equal(load_file(tmp_path / "ours" / "model.safetensors")["lm_head.weight"], own)
    assert load_seq2seq(tmp_path / "ours").config == model.config


def test_wrong_tasks_are_named(tmp_path: Path) -> None:
    save("v1.0", tmp_path)
    assert isinstance(load_causal_model(tmp_path), T5)
    with pytest.raises(UnsupportedModel, match="kind 'seq2seq'.*Use load_seq2seq"):
        load_model(tmp_path)
    T5EncoderModel(T5Config(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="T5EncoderModel is not supported"):
        load_seq2seq(tmp_path)


MIXERS = {
    "softmax": MixerConfig(),
    "window": MixerConfig(name="window", window=5),
    "local": MixerConfig(name="local", group=4, span=2, kernel="softmax"),
    "aug": MixerConfig(name="aug", group=4, taps=3),
    "grouped": MixerConfig(name="grouped", group=4, kernel="softmax"),
    "relu": MixerConfig(name="relu", group=4),
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def tiny(mixer: str, dtype: torch.dtype = torch.float64) -> T5:
    shared: dict[str, Any] = {
        "vocab_size": 31,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 4,
        "head_width": 4,
        "mlp_width": 16,
        "positions": "relative",
        "relative": RelativeConfig(buckets=8, max_distance=20),
        "scaled_scores": False,
        "mixers": (MIXERS[mixer],) * 2,
        "family": "t5",
    }
    config = Seq2SeqConfig(
        encoder=EncoderConfig(**shared, post_norm=False), decoder=DecoderConfig(**shared)
    )
    model = randomise(T5(config), 0)
    model.tie()  # type: ignore[operator]
    return model.to(dtype)  # type: ignore[return-value]


def texts(count: int, least: int, most: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(31) for _ in range(rng.randint(least, most))] for _ in range(count)]


@every_mixer
@torch.no_grad()
def test_steps_and_trees_equal_the_full_form_in_a_ragged_batch(mixer: str) -> None:
    model, rng = tiny(mixer), random.Random(2)
    state, sources = model.new_state(4), texts(4, 1, 11)
    model.read(sources, range(4), state)
    histories = texts(4, 1, 80, seed=3)
    for slot, history in enumerate(histories):
        cut = rng.randrange(len(history) + 1)
        for part in filter(None, (history[:cut], history[cut:])):
            model.step([StepInput(slot, part)], state)
            state.commit(slot, range(len(part)))
    trees = [random_tree(rng, nodes) for nodes in (1, 5, 9, 12)]
    before = [state.snapshot(slot) for slot in range(4)]
    output = model.step([StepInput.tree(slot, tree) for slot, tree in enumerate(trees)], state)
    for slot, (tree, rows) in enumerate(zip(trees, output.slices, strict=True)):
        source = torch.tensor([sources[slot]])
        for node, logits in enumerate(output.logits[rows]):
            target = torch.tensor([[*histories[slot], *path_tokens(tree, node)]])
            assert_close(logits, model(source, target)[0, -1])
        state.drop(slot)
        assert_same_bytes(state.snapshot(slot), before[slot])


@torch.no_grad()
def test_a_fork_has_the_source_and_goes_on_alone() -> None:
    model, state = tiny("aug"), None
    state = model.new_state(2)
    model.read([[1, 2, 3]], [0], state)
    model.step([StepInput(0, [4, 5])], state)
    state.commit(0, [0, 1])
    state.fork(0, 1)
    logits = model.step([StepInput(0, [6]), StepInput(1, [6])], state).logits
    assert_close(logits[0], logits[1])
    assert state.bytes(1) == state.bytes(0) > 0
    with pytest.raises(StateError, match="does not fit"):
        state.restore(0, state.snapshot(0)[:-1])


def decode(model: T5, sources: list[list[int]], nodes: int, slots: int) -> list[list[int]]:
    """Greedy outputs, drafted by prompt look-up when there are nodes for it."""
    drafter = PromptLookup(options=LookupOptions(min_ngram=1)) if nodes else None
    engine = Engine(
        model, verifier=GreedyVerifier(), drafter=drafter, policy=Fixed(nodes), slots=slots
    )
    params = SamplingParams(max_tokens=40, temperature=0.0)
    rows = {engine.add(Request(tuple(source), params)): i for i, source in enumerate(sources)}
    outputs: list[list[int]] = [[] for _ in sources]
    accepted = 0
    while engine.busy:
        for emitted in engine.step():
            outputs[rows[emitted.sequence.request]] += emitted.tokens
            accepted += len(emitted.accepted.path) - 1
            assert emitted.sequence.prompt_tokens == len(sources[rows[emitted.sequence.request]])
    assert bool(accepted) == bool(nodes)
    return outputs


@pytest.mark.crossed(2)
@every_mixer
def test_greedy_output_with_drafts_is_the_output_without(mixer: str) -> None:
    model, sources = tiny(mixer).to_inference(), texts(6, 2, 15, seed=5)
    plain = decode(model, sources, nodes=0, slots=1)
    assert all(len(output) == 40 for output in plain)
    assert decode(model, sources, nodes=5, slots=1) == plain
    assert decode(model, sources, nodes=5, slots=4) == plain


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_source_is_counted_and_goes_with_a_sequence_that_leaves_its_slot(mixer: str) -> None:
    model, sources = tiny(mixer).to_inference(), texts(4, 2, 15, seed=5)
    plain = decode(model, sources, nodes=0, slots=1)
    state = model.new_state(1)
    for source in sources:
        model.open(source, 0, state)
        model.step([StepInput(0, [0, 1, 2])], state)
        state.commit(0, range(3))
        assert state.bytes(0) == state.bytes_at(3, len(source)) > state.bytes_at(3)
    # room for two of them at most, once they have grown
    room = 2 * state.bytes_at(41, 15)
    engine = Engine(model, verifier=GreedyVerifier(), slots=2, state_bytes=room)
    params = SamplingParams(max_tokens=40, temperature=0.0)
    outputs: dict[int, list[int]] = {}
    for priority, source in enumerate(sources):
        outputs[engine.add(Request(tuple(source), params, priority=priority))] = []
        for _ in range(3):
            for emitted in engine.step():
                outputs[emitted.sequence.request] += emitted.tokens
    assert engine.waiting == 2
    while engine.busy:
        for emitted in engine.step():
            outputs[emitted.sequence.request] += emitted.tokens
    assert list(outputs.values()) == plain
    needed = state.bytes_at(2, 500)
    small = Engine(model, verifier=GreedyVerifier(), state_bytes=needed - 1)
    if mixer == "softmax":
        assert small.limits.fitted(Request((1, 2), params)).params.max_tokens == 40
    with pytest.raises(StateError, match=f"500 tokens .* takes {needed} bytes"):
        small.add(Request((1,) * 500, params))


@torch.no_grad()
def test_greedy_output_is_that_of_transformers(tmp_path: Path) -> None:
    theirs, ours = save("v1.0", tmp_path), load_seq2seq(tmp_path)
    source = batch()[0][:1]
    # its own cache has as many layers as the encoder, which is wrong where the decoder has more
    expected = theirs.generate(
        source,
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        decoder_start_token_id=0,
        use_cache=False,
    )
    params = SamplingParams(max_tokens=30, temperature=0.0, logit_bias={1: -1e9})
    engine = Engine(ours.to_inference(), verifier=GreedyVerifier())
    engine.add(Request(tuple(source[0].tolist()), params))
    found: list[int] = []
    while engine.busy:
        found += [token for emitted in engine.step() for token in emitted.tokens]
    assert found == expected[0, 1:].tolist()


def test_penalties_are_about_the_output() -> None:
    """A source token is not a repetition; the engine used to count it as one."""
    model = tiny("softmax").to_inference()
    engine = Engine(model, verifier=GreedyVerifier())
    params = SamplingParams(max_tokens=1, temperature=0.0, repetition_penalty=1e6)
    engine.add(Request(tuple(range(1, 31)), params))
    (emitted,) = engine.step()
    logits = model.full_logits(list(range(1, 31)), [[]])[0]
    assert logits[1:].max() > 0
    assert emitted.tokens == (1 + int(logits[1:].argmax()),)


def test_costs_are_measured_behind_a_source() -> None:
    assert measure(tiny("aug", torch.float32).to_inference()).seconds


def test_misuse_is_named(tmp_path: Path) -> None:
    model = tiny("softmax")
    state = model.new_state(2)
    with pytest.raises(StateError, match="slot 1 has no source"):
        model.step([StepInput(1, [0])], state)
    with pytest.raises(InputError, match="a source has no tokens"):
        model.read([[1], []], [0, 1], state)
    with pytest.raises(InputError, match="a source has no tokens"):
        model(torch.ones(1, 2).long(), torch.ones(1, 2).long(), torch.zeros(1, 2))
    from linspec.drafters import DrafterContext, make_drafter

    with pytest.raises(DrafterError, match="drafts for decoders"):
        make_drafter(Medusa.name, DrafterContext(model))
    with pytest.raises(ConfigError, match="a relative bias needs 4 or more buckets"):
        RelativeConfig(buckets=2)


@torch.no_grad()
def test_a_linear_model_survives_its_own_format(tmp_path: Path) -> None:
    model, (source, target, mask) = tiny("aug"), batch()
    source, target = source % 31, target % 31
    save_model(model, None, tmp_path)
    again = load_seq2seq(tmp_path, dtype=torch.float64)
    assert again.config == model.config
    assert_close(again(source, target, mask), model(source, target, mask))
    assert again.decoder.blocks[1].mixer.relative is again.decoder.blocks[0].mixer.relative
