"""The step form equals the full form for every mixer under every setting that families choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    GROUP,
    MIXER_NAMES,
    assert_close,
    feed,
    full_logits,
    mixer_config,
    prefilled,
    random_tokens,
    randomise,
    tiny_config,
    tree_logits,
)

from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.decoding.tree import from_paths
from linspec.errors import ConfigError
from linspec.mixers.config import RelativeConfig
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from linspec.models.decoder import Decoder
from linspec.models.flash_config import FlashConfig

TREE = from_paths(1, [(2, 3), (2, 4, 5, 6, 7), (8, *range(2 * GROUP + 1)), (9,)])
# between them they have every setting, and each goes with every mixer
GEMMA = {
    "norms": "both",
    "norm_offset": True,
    "qk_norm": True,
    "score_factor": 0.8,
    "score_cap": 0.7,
    "logit_cap": 3.0,
    "embedding_scale": 4.0,
    "layer_ropes": ("main", "local", "none"),
    "local_rope": RopeConfig(theta=50.0, kind="yarn", factor=2.0, original_max_positions=8),
}
PARALLEL = {
    "norm": "layer",
    "residual": "parallel",
    "residual_scale": 0.5,
    "logit_scale": 0.25,
    "qk_norm": True,
    "qk_norm_of": "each",
    "rope": RopeConfig(partial_rotary_factor=0.5, attention_factor=1.3),
}
BEHIND = {"norms": "behind", "qk_norm": True, "qk_norm_of": "whole"}
SETTINGS = {"gemma": GEMMA, "parallel": PARALLEL, "behind": BEHIND}


def model_of(name: str, settings: dict[str, Any]) -> Decoder:
    config = tiny_config(*(mixer_config(name) for _ in range(3)))
    return randomise(Decoder(replace(config, **settings)), seed=0).double()


@pytest.mark.crossed(4)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_steps_equal_the_full_form(name: str, settings: dict[str, Any]) -> None:
    if name == "shadow" and "layer_ropes" in settings:
        with pytest.raises(ConfigError, match="have rotary positions of their own; choose 'pages'"):
            model_of(name, settings)
        return
    model = model_of(name, settings)
    for length in (0, GROUP + 2):
        prompt = random_tokens(length)
        found = model.step([StepInput.tree(0, TREE)], prefilled(model, prompt)).logits
        assert_close(found, tree_logits(model, prompt, TREE))
    text = random_tokens(MAX_STAGED + 5)
    assert_close(feed(model, model.new_state(), text)[-1:], full_logits(model, [text]))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_configuration_is_written_and_read(settings: dict[str, Any]) -> None:
    config = replace(tiny_config(*(mixer_config("softmax") for _ in range(3))), **settings)
    assert DecoderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": "around"}, "norms must be one of before, behind, both"),
        ({"residual": "none"}, "residual must be one of"),
        ({"residual": "parallel", "norms": "both"}, "goes with norms 'before'"),
        ({"residual_scale": 0.0}, "residual_scale must be finite and above 0"),
        ({"embedding_scale": float("nan")}, "embedding_scale must be finite"),
        ({"score_factor": -1.0}, "score_factor must be finite and above 0"),
        ({"score_cap": -1.0}, "score_cap must be finite and 0 or more"),
        ({"logit_cap": float("inf")}, "logit_cap must be finite"),
        ({"qk_norm_of": "none"}, "qk_norm_of must be one of head, whole, each"),
        ({"norm_offset": True, "norm": "layer"}, "norm_offset goes with norm 'rms'"),
        ({"layer_ropes": ("main",)}, "1 layer_ropes for 2 layers"),
        ({"layer_ropes": ("main", "other")}, "layer_ropes must be one of main, local, none"),
        ({"layer_ropes": ("main", "local")}, "give both, or neither"),
        ({"local_rope": RopeConfig()}, "give both, or neither"),
        ({"rope": RopeConfig(partial_rotary_factor=0.3)}, "turns 1 of 4"),
        ({"rope": RopeConfig(kind="longrope")}, "short_factors has 0 numbers"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_named(
    changes: dict[str, Any], message: str
) -> None:
    shape = tiny_config(mixer_config("softmax"), mixer_config("softmax"))
    with pytest.raises(ConfigError, match=message):
        replace(shape, **changes)


@pytest.mark.parametrize(
    "changes", [{"norms": "both"}, {"residual_scale": 0.5}, {"score_cap": 5.0}], ids=str
)
def test_blocks_of_another_kind_refuse_to_be_arranged(changes: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"vocab_size": 31, "width": 16, "mlp_width": 16}
    with pytest.raises(ConfigError, match="mean nothing to a FLASH model"):
        FlashConfig(**shape, layers=1, head_width=8, turned=4, **changes)
    heads: dict[str, Any] = {"layers": 1, "heads": 2, "kv_heads": 2, "head_width": 8}
    heads |= {"positions": "relative", "relative": RelativeConfig()}
    encoder = EncoderConfig(**shape, **heads, post_norm=False)
    with pytest.raises(ConfigError, match="mean nothing to the decoder of an encoder-decoder"):
        Seq2SeqConfig(encoder=encoder, decoder=DecoderConfig(**shape, **heads, **changes))


def test_capped_scores_are_those_of_the_equation() -> None:
    model = model_of("softmax", {"score_cap": 0.7})
    other = model_of("softmax", {})
    ids = torch.tensor([random_tokens(9)])
    with torch.no_grad():
        assert (model(ids) - other(ids)).abs().max() > 1e-3
