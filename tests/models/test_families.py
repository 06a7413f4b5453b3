"""Every family against transformers' own implementation, on tiny random checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import (
    LINEAR,
    LLAMA3,
    LONGROPE,
    MODELS,
    SIZES,
    YARN,
    assert_close,
    make,
    save,
    tokens,
)
from transformers import AutoModelForCausalLM

from linspec.checkpoints.families.base import FAMILIES
from linspec.checkpoints.families.known import family_of, read_config, write_config
from linspec.checkpoints.hub import load_config, load_model, save_model
from linspec.errors import CheckpointError, InputError, UnsupportedModel
from linspec.mixers.config import MixerConfig
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@torch.no_grad()
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path)
    ids = tokens()
    assert_close(load_model(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.crossed(3)
@every_model
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_transformers(name: str, side: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path)
    ids = tokens(rows=3)
    lengths = torch.tensor([23, 9, 1])[:, None]
    time = torch.arange(23)
    mask = time < lengths if side == "right" else time >= 23 - lengths
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert_close(load_model(tmp_path)(ids, mask)[mask], expected[mask])


@torch.no_grad()
def test_row_padded_at_both_ends_equals_the_row_alone(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model, ids = load_model(tmp_path), tokens(rows=1, length=10)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0, 0]])
    torch.testing.assert_close(model(ids, mask)[:, 2:7], model(ids[:, 2:7]))


def test_mask_with_gaps_or_of_other_shape_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model, ids = load_model(tmp_path), tokens(rows=1, length=4)
    with pytest.raises(InputError, match="row 0 has padding between"):
        model(ids, torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(InputError, match="shape"):
        model(ids, torch.ones(1, 5))


@pytest.mark.crossed(3)
@every_model
@torch.no_grad()
def test_saving_back_gives_transformers_the_same_model(name: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), None, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key
    assert torch.equal(again.eval()(tokens()).logits, theirs(tokens()).logits)
    assert load_config(tmp_path / "ours") == load_config(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_sharded_checkpoints(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_close(load_model(tmp_path)(tokens()), theirs(tokens()).logits)


@torch.no_grad()
def test_original_gpt2_names_without_prefix(tmp_path: Path) -> None:
    theirs = make("gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    assert_close(load_model(tmp_path)(tokens()), theirs(tokens()).logits)


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR])
def test_old_and_new_rope_styles_mean_the_same(rope: dict[str, Any]) -> None:
    base = {"model_type": "llama", **SIZES}
    fields = {key: rope[key] for key in rope if key not in ("rope_theta", "rope_type")}
    old = base | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"rope_type": rope["rope_type"], **fields},
    }
    oldest = old | {"rope_scaling": {"type": rope["rope_type"], **fields}}
    new = read_config(base | {"rope_parameters": rope})
    assert read_config(old) == read_config(oldest) == new
    assert new.rope.kind == rope["rope_type"]
    assert new.rope.theta == rope["rope_theta"]


def test_written_config_reads_the_same_with_old_keys_only() -> None:
    config = read_config({"model_type": "llama", **SIZES, "rope_parameters": LLAMA3})
    written = write_config(FAMILIES["llama"], config)
    del written["rope_parameters"]
    assert read_config(written) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {**LINEAR, "rope_type": "proportional"}}, "'proportional'.*llama3"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "mish"}, "'mish'.*gelu_new"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"model_type": "mamba"}, "'mamba'.*gpt2.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "None is not supported"),
        ({"model_type": ["llama"]}, "not supported"),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3},
            "layer types|layer_types",
        ),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
    ],
)
def test_unsupported_configs_name_the_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_config({"model_type": "llama", **SIZES} | change)
    assert isinstance(error.value, UnsupportedModel) or "layer_types" in change


# settings in the style of the years in which these families came out, and what they mean
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
PUBLISHED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "gemma3_text",
        {
            "head_dim": 8,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 512,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 16,
        },
        {
            "rope": RopeConfig(theta=1e6, kind="linear", factor=8.0),
            "local_rope": RopeConfig(theta=1e4),
            "layer_ropes": ("local", "local", "main"),
            "score_factor": 0.25,
            "logit_cap": 0.0,
        },
    ),
    (
        "gemma2",
        {
            "head_dim": 8,
            "rope_theta": 10000.0,
            "sliding_window": 4,
            "hidden_act": "gelu_pytorch_tanh",
        },
        {
            "score_cap": 50.0,
            "logit_cap": 30.0,
            "mixers": (
                MixerConfig(name="window", window=4),
                MixerConfig(),
                MixerConfig(name="window", window=4),
            ),
        },
    ),
    (
        "stablelm",
        {"rope_theta": 1000.0, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
        {"rope": RopeConfig(theta=1000.0, partial_rotary_factor=0.25), "norm": "layer"},
    ),
    (
        "gpt_neox",
        {"rotary_pct": 0.5, "rotary_emb_base": 5000, "use_parallel_residual": True},
        {"rope": RopeConfig(theta=5000.0, partial_rotary_factor=0.5), "residual": "parallel"},
    ),
    (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 1.0,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
        {
            "rope": RopeConfig(
                kind="longrope",
                factor=6.0,
                original_max_positions=16,
                attention_factor=math.sqrt(1 + math.log(6) / math.log(16)),
                short_factors=(1.0, 1.1, 1.2, 1.3),
                long_factors=(1.0, 2.0, 3.0, 4.0),
                long=True,
            )
        },
    ),
    (
        "smollm3",
        {"num_hidden_layers": 8, "rope_theta": 5000000.0, "no_rope_layer_interval": 4},
        {"layer_ropes": ("main", "main", "main", "none") * 2, "rope": RopeConfig(theta=5e6)},
    ),
    (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {
            "rope": RopeConfig(
                theta=5e5,
                kind="yarn",
                factor=4.0,
                original_max_positions=96,
                attention_factor=0.1 * math.log(4.0) + 1,
            )
        },
    ),
]


@pytest.mark.parametrize(("family", "given", "meant"), PUBLISHED, ids=str)
def test_settings_as_they_were_published(
    family: str, given: dict[str, Any], meant: dict[str, Any]
) -> None:
    config = read_config({"model_type": family, **SIZES} | given)
    assert isinstance(config, DecoderConfig)
    assert {name: getattr(config, name) for name in meant} == meant
    assert read_config(write_config(FAMILIES[family], config)) == config


FULL = "full_attention"
UNSOUND: list[tuple[str, dict[str, Any], str]] = [
    (
        "granite",
        {"residual_multiplier": 0.0},
        "residual_multiplier must be finite and above 0, got 0",
    ),
    ("granite", {"logits_scaling": -2.0}, "logits_scaling must be finite and above 0, got -2"),
    ("granite", {"embedding_multiplier": "3"}, "embedding_multiplier"),
    ("granite", {"hidden_act": "mish"}, "'mish'.*supported: .*gelu_new"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be finite and above 0"),
    ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping must be.*got -50"),
    ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping must be.*got 0"),
    ("gemma2", {"hidden_activation": "mish"}, "'mish'.*supported: .*gelu_new"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types|layer types"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("gemma3_text", {"sliding_window": 0}, "window of 1 or more tokens, got 0"),
    ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "su"}}}, "'su'"),
    ("smollm3", {"no_rope_layers": [1, 2, 1]}, r"no_rope_layers must be.*\[1, 2, 1\]"),
    (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 1]},
        "no_rope_layers must be a list of 0 and 1 for each of 3",
    ),
    ("stablelm", {"partial_rotary_factor": 0.1}, "partial_rotary_factor 0.1 turns 0 of 8"),
    (
        "stablelm",
        {"partial_rotary_factor": 1.5},
        "partial_rotary_factor must be above 0 and at most 1",
    ),
    ("gpt_neox", {"rotary_pct": 0.4}, "partial_rotary_factor 0.4 turns 3 of 8"),
    ("phi3", {"sliding_window": -1}, "window must be 0 or more|window of 1 or more"),
    ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor"),
    (
        "phi3",
        {"rope_parameters": LONGROPE | {"short_factor": [1.0, 1.0, 0.0, 1.0]}},
        "short_factors",
    ),
    ("llama", {"rope_parameters": YARN | {"factor": -1.0}}, "factor must be finite and above 0"),
    (
        "llama",
        {"rope_parameters": YARN | {"original_max_position_embeddings": 0}},
        "original_max_position_embeddings must be finite and above 0|zero",
    ),
    (
        "llama",
        {"rope_parameters": YARN | {"beta_fast": -1.0}},
        "beta_fast must be finite and above 0",
    ),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 1.0}}, "rope theta is 1"),
]


@pytest.mark.parametrize(("family", "change", "message"), UNSOUND, ids=str)
def test_unsound_settings_are_named_with_value_and_rule(
    family: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config({"model_type": family, **SIZES} | change)


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_key_value_heads": 3}])
def test_contradicting_configs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not a sound llama config"):
        read_config({"model_type": "llama", **SIZES} | change)


def test_sliding_layers_without_a_window_are_refused() -> None:
    data = {"model_type": "qwen2", **SIZES, "layer_types": ["sliding_attention"] * 3}
    with pytest.raises(UnsupportedModel, match="sliding_attention with use_sliding_window"):
        read_config(data)


def test_end_tokens_come_from_generation_config_first(tmp_path: Path) -> None:
    save("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 7}))
    (tmp_path / "generation_config.json").unlink()
    assert load_config(tmp_path).eos_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7], "pad_token_id": 3}')
    config = load_config(tmp_path)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (9, 7), 3)


TINY = DecoderConfig(
    vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48
)
WINDOW = MixerConfig(name="window", window=4)


def test_ordinary_format_only_for_what_it_can_say() -> None:
    def said(**changes: Any) -> bool:
        fields = TINY.to_dict() | changes
        return family_of(DecoderConfig.from_dict(fields)) is not None

    def mixed(*mixers: MixerConfig) -> list[dict[str, Any]]:
        return DecoderConfig(**{**_fields(), "mixers": mixers}).to_dict()["mixers"]

    assert said()
    assert said(mixers=mixed(MixerConfig(group=16), MixerConfig()))
    assert said(family="mistral", mixers=mixed(WINDOW, WINDOW))
    assert said(family="qwen2", qkv_bias=True, mixers=mixed(MixerConfig(), WINDOW))
    assert not said(mixers=mixed(WINDOW, WINDOW))
    assert not said(family="mistral", mixers=mixed(WINDOW, MixerConfig()))
    assert not said(mixers=mixed(MixerConfig(taps=4), MixerConfig()))
    assert not said(mixers=mixed(MixerConfig(name="relu"), MixerConfig()))
    assert not said(qk_norm=True)
    assert not said(gated_mlp=False)
    assert not said(family="gpt2")
    assert not said(family="other")


def _fields() -> dict[str, Any]:
    return {field: getattr(TINY, field) for field in TINY.to_dict()}
