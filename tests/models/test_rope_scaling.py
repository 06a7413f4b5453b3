"""`--rope-scaling`: a trained model on longer texts, as if its configuration said so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import tiny_tokenizer
from helpers import assert_close, full_logits, random_tokens, tiny_model
from transformers import LlamaConfig

from linspec import LLM, SamplingParams
from linspec.checkpoints.families.ropes import read_rope
from linspec.errors import ConfigError
from linspec.mixers.rope_config import RopeConfig
from linspec.models.rope_scaling import scaled_config, with_rope_scaling

TEXT = random_tokens(40)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_scaled_model_is_the_model_with_that_configuration(kind: str, prepared: bool) -> None:
    model = tiny_model("softmax", taps=0, max_positions=16)
    config = scaled_config(model.config, f"{kind}:4")
    assert config.max_positions == 64 and config.rope.factor == 4.0
    other = type(model)(config).to(torch.float64)
    other.load_state_dict(model.state_dict())
    expected = full_logits(other, [TEXT])
    made = with_rope_scaling(model.float().to_inference() if prepared else model, f"{kind}:4")
    assert made.position_limit == 64
    atol = 1e-4 if prepared else 1e-10
    assert_close(full_logits(made, [TEXT]).double(), expected, atol=atol)
    assert float((full_logits(model, [TEXT]).double() - expected).abs().max()) > 1e-3
    assert with_rope_scaling(model, None) is model


def test_yarn_is_what_configuration_files_call_so() -> None:
    config = tiny_model("softmax", max_positions=16).config
    found = scaled_config(config, "yarn:factor=4").rope
    given = {
        "rope_type": "yarn",
        "rope_theta": config.rope.theta,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    assert found == read_rope(LlamaConfig(rope_parameters=given, max_position_embeddings=64))


def test_a_longer_text_is_decoded() -> None:
    model = tiny_model("softmax", taps=0, max_positions=16)
    params = SamplingParams(max_tokens=8)
    llm = LLM(model, tokenizer=tiny_tokenizer(), rope_scaling="yarn:4")
    assert len(llm.generate([TEXT], params)[0].token_ids) == 8


@pytest.mark.parametrize("spec", ["yarn", "yarn:1", "yarn:factor=-2", "ntk:4", "yarn:4,beta=2"])
def test_what_scales_nothing_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match="rope scaling|factor"):
        with_rope_scaling(tiny_model("softmax"), spec)


def test_positions_that_are_scaled_already_are_refused() -> None:
    model = tiny_model("softmax")
    model.config = replace(model.config, rope=RopeConfig(kind="linear", factor=2.0))
    with pytest.raises(ConfigError, match=r"this one has rope \(linear\)\. Leave it out"):
        with_rope_scaling(model, "yarn:4")
