"""Every family in every form: steps, batches, integer weights, linear mixers, linspec's own format."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import feed, full_logits, random_tokens, random_tree, randomise, tree_logits
from hf_models import MODELS, VOCAB, assert_close, make, save, tokens
from transformers import AutoModelForCausalLM

from linspec.bench.model import info
from linspec.checkpoints.hub import load_config, load_model, save_model
from linspec.checkpoints.load_quantized import quantize_model
from linspec.checkpoints.quantized import save_quantized
from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.errors import ContextOverflow
from linspec.kernels.cpu.library import load
from linspec.mixers.config import MixerConfig
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.head import make_head
from linspec.models.one_call import why_not
from linspec.models.step_plan import TOLD
from linspec.train.pieces import kl_of_states

AUG = MixerConfig(name="aug", group=4, taps=3)
every_model = pytest.mark.parametrize("name", MODELS)
LONG = MAX_STAGED + 7


@pytest.fixture
def wide(name: str, tmp_path: Path) -> Decoder:
    """The model in float64, where the two forms agree to the last digits."""
    save(name, tmp_path)
    return load_model(tmp_path, dtype=torch.float64)


def same(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.crossed(3)
@every_model
@pytest.mark.parametrize("length", [0, 9, LONG])
def test_steps_equal_the_full_form(wide: Decoder, length: int) -> None:
    prompt, tree = random_tokens(length), random_tree(random.Random(length), 9)
    state = wide.new_state()
    if prompt:
        same(feed(wide, state, prompt)[-1:], full_logits(wide, [prompt]))
    same(wide.step([StepInput.tree(0, tree)], state).logits, tree_logits(wide, prompt, tree))


@pytest.mark.crossed(2)
@every_model
def test_a_batch_equals_its_sequences_alone(wide: Decoder) -> None:
    prompts = [random_tokens(13), random_tokens(5, seed=1), random_tokens(LONG, seed=2)]
    trees = [random_tree(random.Random(seed), 5) for seed in range(3)]
    state = wide.new_state(3)
    for slot, prompt in enumerate(prompts):
        feed(wide, state, prompt, slot)
    output = wide.step([StepInput.tree(i, tree) for i, tree in enumerate(trees)], state)
    for place, prompt, tree in zip(output.slices, prompts, trees, strict=True):
        same(output.logits[place], tree_logits(wide, prompt, tree))


@every_model
@torch.no_grad()
def test_the_inference_form_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path)
    model, ids = load_model(tmp_path).to_inference(), tokens(rows=1, length=50)
    state = model.new_state()
    steps = [feed(model, state, ids[0, first:last].tolist()) for first, last in ((0, 40), (40, 50))]
    assert_close(torch.cat(steps), theirs(ids).logits[0])


@pytest.mark.crossed(2)
@every_model
@torch.no_grad()
def test_integer_weights_have_a_step_that_equals_their_full_form(name: str, tmp_path: Path) -> None:
    if load().library is None:
        pytest.skip("integer weights need the kernels")
    save(name, tmp_path)
    model, ids = quantize_model(load_model(tmp_path), 8, {}), tokens(rows=1, length=30)
    # one rounding of an input to 8 bits that falls the other way shows in the third digit
    stepped = torch.cat(
        [feed(model, state, [t]) for state in [model.new_state()] for t in ids[0].tolist()]
    )
    same(stepped, model(ids)[0], atol=2e-2)


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


@every_model
@torch.no_grad()
def test_integer_weights_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    if load().library is None:
        pytest.skip("integer weights need the kernels")
    save(name, tmp_path / "theirs")
    model = quantize_model(load_model(tmp_path / "theirs"), 8, {})
    tokenizer: Any = NoTokenizer()
    with save_quantized(model, tokenizer, tmp_path / "ours", 8, {}):
        pass
    again, ids = load_model(tmp_path / "ours"), random_tokens(20)
    assert again.config == model.config
    found, expected = (feed(each, each.new_state(), ids) for each in (again, model))
    assert torch.equal(found, expected)


@pytest.mark.crossed(2)
@every_model
@torch.no_grad()
def test_every_family_is_computed_in_one_call(name: str, tmp_path: Path) -> None:
    """A prompt, and a tree behind it; layer by layer the same."""
    save(name, tmp_path)
    model, prompt = load_model(tmp_path).to_inference(), random_tokens(LONG)
    if load().library is None:
        pytest.skip("there are no kernels")
    assert model.native is not None and why_not(model) is None
    assert unusual(model.config) <= TOLD and info(tmp_path)["step"] == "one call into C"
    tree, results = random_tree(random.Random(3), 9), []
    for form in (model.native, None):
        model.native = form
        state = model.new_state()
        prefilled = feed(model, state, prompt)
        results.append((prefilled, model.step([StepInput.tree(0, tree)], state).logits))
    for one, other in zip(*results, strict=True):
        same(one, other, atol=1e-4)


def unusual(config: DecoderConfig) -> set[str]:
    """Settings that differ from those of a plain Llama."""
    sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
    plain = DecoderConfig(**{size: getattr(config, size) for size in sizes})
    return {
        each.name
        for each in fields(config)
        if getattr(config, each.name) != getattr(plain, each.name)
    }


# ---- what each setting does


def matters() -> list[tuple[str, str]]:
    """Every model and each of its settings beyond sizes that can be taken back with the same weights."""
    names = """score_factor score_cap logit_cap embedding_scale residual_scale logit_scale layer_ropes rope
        local_rope norm_offset residual mixers activation"""
    found = []
    for name in MODELS:
        config = config_of(name)
        found += [(name, each) for each in names.split() if each in unusual(config)]
    # one has no norm of its own to take back to; the other changes nothing within the context
    without = {("stablelm-parallel", "residual"), ("llama-rope-dynamic", "rope")}
    return [pair for pair in found if pair not in without]


def config_of(name: str) -> DecoderConfig:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make(name).config.save_pretrained(folder)
        return load_config(folder)


@pytest.mark.crossed(3)
@pytest.mark.parametrize(("name", "setting"), matters())
@torch.no_grad()
def test_a_setting_that_is_taken_back_changes_the_logits(
    name: str, setting: str, tmp_path: Path
) -> None:
    save(name, tmp_path)
    model, ids = load_model(tmp_path), tokens(length=40)
    usual = {each.name: each.default for each in fields(model.config)}[setting]
    changes: dict[str, Any] = {setting: usual}
    if setting == "rope":
        changes = {"rope": RopeConfig()}
    if setting in ("layer_ropes", "local_rope"):
        changes = {"layer_ropes": (), "local_rope": None}
    other = Decoder(replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict())
    assert (other(ids) - model(ids)).abs().max() > 1e-3


# ---- caps and scales where no transformers model stands beside


@torch.no_grad()
def test_a_prompt_of_the_embeddings_of_tokens_is_the_prompt_of_these_tokens(tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    model, ids = load_model(tmp_path), random_tokens(11)
    given = model.embed(torch.tensor(ids))
    inputs = StepInput(0, [0] * len(ids), embeddings=given)
    found = model.step([inputs], model.new_state()).logits
    torch.testing.assert_close(found, feed(model, model.new_state(), ids))


@pytest.mark.parametrize("capped", [True, False])
def test_kl_of_a_model_with_capped_logits_has_the_gradient_of_autograd(capped: bool) -> None:
    config = config_of("gemma2")
    shape = replace(config, logit_cap=0.7) if capped else replace(config, logit_cap=0.0)
    head, other = (randomise(make_head(shape), seed).double() for seed in (0, 1))
    given, wanted = (
        torch.randn(5, shape.width, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    p = other(wanted).log_softmax(-1)
    expected = (p.exp() * (p - head(given).log_softmax(-1))).sum() / 5
    (slope,) = torch.autograd.grad(expected, given)
    for layer in (head, other):
        layer.requires_grad_(False)
    loss = kl_of_states(given, wanted.detach(), head, other)
    same(loss, expected)
    same(torch.autograd.grad(loss, given)[0], slope)


@torch.no_grad()
def test_resized_embeddings_keep_the_cap_of_the_logits(tmp_path: Path) -> None:
    save("gemma2", tmp_path / "theirs")
    config = load_config(tmp_path / "theirs")
    plain = Decoder(config.with_mixers((AUG,) * config.layers))
    save_model(randomise(plain, seed=3), None, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    before = model(tokens()).logits
    model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    same(model(tokens()).logits[..., :VOCAB], before, atol=1e-5)
    assert model(tokens()).logits.abs().max() <= config.logit_cap


# ---- what longrope does


def longrope(limit: int, folder: Path) -> Decoder:
    """The model with a context limit of its own, and the attention factor that it has."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    factor = load_config(folder).rope.attention_factor
    data["max_position_embeddings"] = limit
    data["rope_parameters"]["attention_factor"] = factor
    path.write_text(json.dumps(data))
    return load_model(folder)


@torch.no_grad()
def test_the_context_limit_decides_which_factors_longrope_has(tmp_path: Path) -> None:
    theirs = save("phi3-longrope", tmp_path, sliding_window=None)
    short, long = tokens(length=12), tokens(length=30)
    model = load_model(tmp_path)
    assert model.config.rope.long
    assert_close(model(long), theirs(long).logits)
    # transformers turns a short text by the short factors, whose keys would have to turn again later
    assert (model(short) - theirs(short).logits).abs().max() > 1e-3
    limited = longrope(16, tmp_path)
    assert not limited.config.rope.long
    assert_close(limited(short), theirs(short).logits)


@torch.no_grad()
def test_dynamic_scaling_changes_nothing_up_to_the_limit_and_ends_there(tmp_path: Path) -> None:
    theirs = save("llama-rope-dynamic", tmp_path)
    model, ids = load_model(tmp_path), tokens(length=96)
    assert_close(model(ids), theirs(ids).logits)
    state = model.new_state()
    feed(model, state, ids[0].tolist())
    with pytest.raises(ContextOverflow, match="beyond this model's 96 positions"):
        model.step([StepInput(0, [1])], state)


# ---- linear mixers and linspec's own format


@pytest.mark.crossed(2)
@every_model
@torch.no_grad()
def test_linear_mixers_take_the_place_of_attention(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "theirs")
    config = load_config(tmp_path / "theirs")
    linear = config.with_mixers((AUG,) * config.layers)
    model = randomise(Decoder(linear), seed=3)
    save_model(model, None, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "linspec"
    again = load_model(tmp_path / "ours", dtype=torch.float64)
    assert again.config == linear
    prompt, tree = random_tokens(14), random_tree(random.Random(1), 9)
    state = again.new_state()
    feed(again, state, prompt)
    same(again.step([StepInput.tree(0, tree)], state).logits, tree_logits(again, prompt, tree))


@torch.no_grad()
def test_weights_of_norms_that_are_added_to_1_keep_their_digits_in_bfloat16(tmp_path: Path) -> None:
    theirs = save("gemma3", tmp_path).to(torch.bfloat16)
    norm, x = load_model(tmp_path, dtype=torch.bfloat16).norm, torch.randn(7, 32).bfloat16()
    assert torch.equal(norm(x), theirs.model.norm(x))
