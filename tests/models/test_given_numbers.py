"""Numbers of a config.json that are none, or contradict each other, are named with value and rule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from gguf_files import tiny
from hf_models import FULL, LINEAR, LLAMA3, LONGROPE, SIZES, YARN, save

from linspec.bench.model import info
from linspec.checkpoints.families.known import read_config
from linspec.checkpoints.hub import load_model
from linspec.errors import CheckpointError, ConfigError
from linspec.mixers.rope_config import RopeConfig

GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 16}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_theta": "1e4"}, "rope_theta must be a number, got '1e4'"),
    ("llama", {"rope_theta": "abc"}, "rope_theta must be a number, got 'abc'; write numbers"),
    ("llama", {"rope_theta": True}, "rope_theta must be a number, got True"),
    ("llama", {"rope_parameters": LINEAR | {"rope_theta": "1e4"}}, "rope_parameters.rope_theta"),
    ("llama", {"rope_parameters": LINEAR | {"rope_theta": None}}, "rope_theta must be finite"),
    ("llama", {"rope_parameters": LINEAR | {"factor": "4"}}, "rope_parameters.factor .*got '4'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor must be"),
    ("llama", {"rope_scaling": 5}, "rope_scaling must be an object such as .* got 5"),
    (
        "llama",
        {"rope_parameters": YARN | {"original_max_position_embeddings": "128"}},
        "rope_parameters.original_max_position_embeddings must be a number, got '128'",
    ),
    ("llama", {"rope_parameters": YARN | {"beta_fast": "1"}}, "beta_fast must be a number"),
    ("llama", {"rope_parameters": YARN | {"mscale": "1"}}, "mscale must be a number, got '1'"),
    ("phi3", {"rope_parameters": LONGROPE | {"long_factor": ["1"] * 4}}, "long_factor .*list of"),
    ("phi3", {"rope_parameters": LONGROPE | {"short_factor": 2}}, "short_factor must be a list of"),
    ("gpt_neox", {"rotary_emb_base": "x"}, "rotary_emb_base must be a number, got 'x'"),
    ("gpt_neox", {"rotary_pct": "0.5"}, "rotary_pct must be a number, got '0.5'"),
    ("gemma3_text", {"rope_local_base_freq": "x"}, "rope_local_base_freq must be a number"),
    ("gemma3_text", {"rope_parameters": {FULL: 5}}, f"rope_parameters.{FULL} must be an object"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern .* other than 0, got 0"),
    (
        "gemma3_text",
        {"sliding_window_pattern": "2"},
        "sliding_window_pattern .*, got '2'; leave it",
    ),
    (
        "smollm3",
        {"no_rope_layer_interval": 0},
        "no_rope_layer_interval must .* other than 0, got 0",
    ),
    (
        "gemma2",
        {"final_logit_softcapping": 0},
        "final_logit_softcapping must be finite and above 0",
    ),
    (
        "gemma2",
        {"final_logit_softcapping": 30},
        "config: final_logit_softcapping must be a number with a point, such as 30.0, got 30$",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "config: rope_parameters.factor is missing, which scaling 'linear' needs; add it$",
    ),
]


@pytest.mark.parametrize(("family", "change", "message"), WRONG, ids=range(len(WRONG)))
def test_numbers_that_were_converted_or_failed_without_their_name(
    family: str, change: dict[str, Any], message: str
) -> None:
    own = GEMMA3 if family == "gemma3_text" else {}
    with pytest.raises(CheckpointError, match=message) as error:
        read_config({"model_type": family, **SIZES, **own} | change)
    assert "\n" not in str(error.value)


def test_type_errors_of_transformers_came_on_two_lines() -> None:
    with pytest.raises(CheckpointError, match="hidden_size") as error:
        read_config({"model_type": "llama", **SIZES, "hidden_size": "wide"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("low", "high"), [(4.0, 1.0), (2.0, 2.0)])
def test_swapped_bounds_of_llama3_gave_other_logits(low: float, high: float) -> None:
    swapped = LLAMA3 | {"low_freq_factor": low, "high_freq_factor": high}
    with pytest.raises(CheckpointError, match=f"low_freq_factor is {low} .*the high one is above"):
        read_config({"model_type": "llama", **SIZES, "rope_parameters": swapped})
    with pytest.raises(ConfigError, match="the high one is above the low one"):
        RopeConfig(kind="llama3", low_freq_factor=low, high_freq_factor=high)


def test_longrope_says_where_its_logits_are_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save("phi3-longrope", tmp_path / "long")
    with caplog.at_level(logging.WARNING, "linspec"):
        load_model(tmp_path / "long")
    assert "logits of texts of up to 16 tokens differ from those of transformers" in caplog.text
    assert "up to 16 tokens" in info(tmp_path / "long")["positions"]
    caplog.clear()
    _, plain = tiny("llama", tmp_path / "m.gguf")
    load_model(plain)
    assert not caplog.text and "positions" not in info(plain)
