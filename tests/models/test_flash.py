"""FLASH: full form = step form = tree form, its equations, its file format."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from helpers import (
    VOCAB,
    assert_close,
    assert_same_bytes,
    feed,
    full_logits,
    random_tokens,
    random_tree,
    randomise,
    tree_logits,
)

from linspec.checkpoints.hub import load_model, save_model
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError, ContextOverflow
from linspec.evaluate.quantize import quantize
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.models.flash import Flash
from linspec.models.flash_config import VARIANTS, FlashConfig
from linspec.models.gau import laplace

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def config(variant: str, **switches: Any) -> FlashConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "width": 12,
        "layers": 2,
        "head_width": 8,
        "mlp_width": 10,
        "group": 4,
        "taps": 6 if variant == "aug" else 0,
        "turned": 4,
        "max_positions": 200,
        "relative": RelativeConfig(buckets=8, max_distance=20),
    }
    return FlashConfig(**(shape | {"variant": variant} | switches))


def tiny(variant: str) -> Flash:
    return randomise(Flash(config(variant)), 0).double()  # type: ignore[return-value]


@every_variant
def test_full_step_and_tree_forms_are_one_function(variant: str) -> None:
    model, rng = tiny(variant), random.Random(3)
    for length in (*range(1, 10), 80):
        state, prompt = model.new_state(2), random_tokens(length, seed=length)
        cut = rng.randrange(length)
        parts = [feed(model, state, part, slot=1) for part in (prompt[:cut], prompt[cut:])]
        steps = torch.cat([part for part in parts if len(part)])
        texts = [prompt[: t + 1] for t in range(length)]
        assert_close(steps, full_logits(model, texts))
        tree = random_tree(rng, 12, reach=3)
        before = state.snapshot(1)
        logits = model.step([StepInput.tree(1, tree)], state).logits
        assert_close(logits, tree_logits(model, prompt, tree))
        path = tree.path_to(11)
        assert_same_bytes(state.snapshot(1), before)
        state.commit(1, path)
        after = feed(model, state, [5], slot=1)
        assert_close(after, full_logits(model, [[*prompt, *(tree.tokens[n] for n in path), 5]]))


@torch.no_grad()
def test_the_unit_is_what_the_paper_says() -> None:
    """One unit by loops over time, from the equations."""
    model = tiny("aug")
    unit, x = model.units[0].mixer, torch.randn(11, 12, dtype=torch.float64)
    _, ropes = model.enter(torch.zeros(1, 11, dtype=torch.long), torch.arange(11))
    rope = ropes[0]
    gate, (q, k, v) = unit.gated(x, rope)
    q, k, v = (t[:, 0] for t in (q, k, v))
    bias = unit.relative.between(11, 11)[0] * math.sqrt(8)
    expected = []
    for t in range(11):
        o = sum(
            laplace(q[t, :8] @ k[s, :8] / 4 + bias[t, s]) * v[s] for s in range(t // 4 * 4, t + 1)
        )
        for s in range(t // 4 * 4):
            o = o + (q[t, 8:] @ k[s, 8:]) / 4 * v[s]
        o = o + sum(unit.taps[0, j] * v[t - j] for j in range(min(6, t + 1)))
        expected.append(unit.o(gate[t] * o))
    assert_close(unit(x[None], rope)[0], torch.stack(expected))


@every_variant
def test_no_token_sees_a_later_one(variant: str) -> None:
    model, text = tiny(variant), random_tokens(15)
    changed = [*text[:9], *random_tokens(6, seed=1)]
    with torch.no_grad():
        a, b = (model(torch.tensor([t]))[0, :9] for t in (text, changed))
    assert torch.equal(a, b)


@every_variant
def test_prepared_and_saved_models_are_the_same_function(variant: str, tmp_path: Path) -> None:
    model, text = tiny(variant), [random_tokens(13)]
    expected = full_logits(model, text)
    save_model(model, None, tmp_path)
    again = load_model(tmp_path, dtype=torch.float64)
    assert isinstance(again, Flash) and again.config == model.config
    assert_close(full_logits(again, text), expected)
    model.to_inference()
    assert_close(full_logits(model, text), expected)
    assert_close(feed(model, model.new_state(), text[0])[-1:], expected)


@every_variant
@pytest.mark.parametrize("bits", [8, 4])
def test_a_flash_model_could_not_be_quantized(variant: str, bits: int, tmp_path: Path) -> None:
    shape = config(variant, vocab_size=len(tiny_tokenizer()), width=32, mlp_width=32, eos_ids=(0,))
    model = randomise(Flash(shape), 0).float()
    assert isinstance(model, Flash)
    save_model(model, tiny_tokenizer(), tmp_path / "plain")
    (tmp_path / "text.txt").write_text("abcd end the end of it\n" * 200)
    report = quantize(
        tmp_path / "plain",
        tmp_path / "small",
        bits=bits,
        data=[tmp_path / "text.txt"],
        calibration_bytes=2000,
        limit_bytes=2000,
    )
    assert abs(report.increase) < (0.02 if bits == 8 else 0.2)
    small = load_model(tmp_path / "small")
    assert isinstance(small, Flash) and small.config == model.config
    text = [random_tokens(13)]
    assert_close(full_logits(small, text), feed(small, small.new_state(), text[0])[-1:], 1e-3)


def test_only_quadratic_attention_grows_and_ends() -> None:
    model = tiny("quadratic")
    with pytest.raises(ContextOverflow, match="beyond this model's 200 positions"):
        model.step([StepInput(0, [0] * 201)], model.new_state())
    sizes = []
    for variant in ("quadratic", "aug"):
        model = tiny(variant)
        state = model.new_state()
        feed(model, state, random_tokens(60))
        early = state.bytes(0)
        feed(model, state, random_tokens(60))
        sizes.append(state.bytes(0) - early)
    assert sizes[0] > 0 == sizes[1]


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="variant must be one of"):
        config("global")
    with pytest.raises(ConfigError, match="'aug' needs taps"):
        config("aug", taps=0)
    with pytest.raises(ConfigError, match="even number of features"):
        config("local", turned=9)
    with pytest.raises(ConfigError, match="one head and an even width"):
        config("local", width=13)
    with pytest.raises(ConfigError, match="cannot be replaced"):
        config("local").with_mixers((MixerConfig(),) * 2)
