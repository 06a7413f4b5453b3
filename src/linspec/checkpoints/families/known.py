"""The Hugging Face families that linspec knows: one `Family` per `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import (
    Family,
    Rule,
    Tensors,
    activation_here,
    activation_there,
    read_ids,
)
from linspec.checkpoints.families.bert import BERT
from linspec.checkpoints.families.t5 import T5
from linspec.errors import CheckpointError, UnsupportedModel
from linspec.mixers.config import MixerConfig
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    },
}
LAYER_TYPES = {"softmax": "full_attention", "window": "sliding_attention"}
REFUSED = {"smollm3": "some of its layers have no position embedding"}


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """The model that an ordinary config.json describes.

    Raises UnsupportedModel when our model cannot do what the file asks for, CheckpointError when
    the file contradicts itself.
    """
    family = family_named(data.get("model_type"))
    if data.get("quantization_config"):
        raise UnsupportedModel(
            "the checkpoint is quantized; linspec reads float weights only. Use the original "
            "checkpoint, or dequantize it with transformers and save it again"
        )
    # the table of all configurations, for which linspec's own directories need not wait
    from transformers import AutoConfig

    # a copy: transformers completes nested settings in place
    fields = {key: deepcopy(data[key]) for key in data if key not in ("model_type", "auto_map")}
    try:
        hf = AutoConfig.for_model(family.name, **fields)
        # it belongs to the file, not to the model, so transformers keeps it out of the settings
        hf.architectures = data.get("architectures")
        return family.read(hf)
    except UnsupportedModel:
        raise
    # the file is checked by transformers' own classes, which raise whatever a wrong type leads to
    except Exception as error:
        raise CheckpointError(
            f"config.json is not a sound {family.name} config: {error}"
        ) from error


def family_named(name: object) -> Family:
    """The family of a `model_type`; raises UnsupportedModel with the known ones."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    reason = REFUSED.get(str(name), "linspec does not know this family")
    raise UnsupportedModel(
        f"model_type {name!r} is not supported: {reason}. Supported: {', '.join(FAMILIES)}, linspec"
    )


def family_of(config: ModelConfig, tensors: Tensors | None = None) -> Family | None:
    """The family whose ordinary format says all that `config` and our names of `tensors` say, or None."""
    family = FAMILIES.get(config.family)
    if family is None or any(m.name not in ("softmax", "window") or m.taps for m in config.mixers):
        return None
    plain = config.with_mixers(tuple(_plain(mixer) for mixer in config.mixers))
    try:
        again = read_config(write_config(family, config))
        again = family.adapt(again, family.on_disk(tensors or {}, config).keys())
        return family if again == plain else None
    except CheckpointError:
        return None


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config` as a checkpoint of `family`."""
    return {
        "model_type": family.name,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        **config.token_ids(),
        **family.write(config),
    }


def _plain(mixer: MixerConfig) -> MixerConfig:
    return MixerConfig(name=mixer.name, window=mixer.window if mixer.name == "window" else 0)


def _read_rope(hf: PreTrainedConfig) -> RopeConfig:
    data = hf.rope_parameters
    kind = data.get("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise UnsupportedModel(
            f"rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}"
        )
    if data.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            f"partial_rotary_factor {data['partial_rotary_factor']} is not supported; "
            "linspec turns whole heads (1.0)"
        )
    fields = {ours: data[theirs] for theirs, ours in ROPE_FIELDS[kind].items()}
    return RopeConfig(theta=float(data["rope_theta"]), kind=kind, **fields)


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    """In the style of transformers 5 and in that of older readers, which mean the same."""
    fields = {theirs: getattr(rope, ours) for theirs, ours in ROPE_FIELDS[rope.kind].items()}
    scaling = {"rope_type": rope.kind, **fields}
    written = {"rope_parameters": {"rope_theta": rope.theta, **scaling}, "rope_theta": rope.theta}
    return written | ({"rope_scaling": scaling} if fields else {})


def _read_gated(hf: PreTrainedConfig, **switches: Any) -> DecoderConfig:
    """What Llama, Mistral and Qwen configurations share."""
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_width=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        family=hf.model_type,
        norm_eps=hf.rms_norm_eps,
        activation=activation_here(hf.hidden_act),
        tied_embeddings=hf.tie_word_embeddings,
        rope=_read_rope(hf),
        max_positions=hf.max_position_embeddings,
        bos_id=hf.bos_token_id,
        eos_ids=read_ids(hf.eos_token_id),
        pad_id=hf.pad_token_id,
        **switches,
    )


def _write_gated(config: DecoderConfig) -> dict[str, Any]:
    return {
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": activation_there(config, "gelu_pytorch_tanh"),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        **_write_rope(config.rope),
    }


def _read_llama(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return _read_gated(hf, qkv_bias=bias, out_bias=bias, mlp_bias=hf.mlp_bias)


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return _write_gated(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(hf: PreTrainedConfig) -> DecoderConfig:
    if hf.sliding_window is None:
        return _read_gated(hf)
    window = MixerConfig(name="window", window=hf.sliding_window)
    return _read_gated(hf, mixers=(window,) * hf.num_hidden_layers)


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return _write_gated(config) | {"sliding_window": _window(config)}


def _read_qwen2(hf: PreTrainedConfig) -> DecoderConfig:
    return _read_gated(hf, qkv_bias=True, mixers=_layer_types(hf))


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    window = _window(config)
    return _write_gated(config) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": [LAYER_TYPES[mixer.name] for mixer in config.mixers],
    }


def _read_qwen3(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return _read_gated(hf, qkv_bias=bias, out_bias=bias, qk_norm=True, mixers=_layer_types(hf))


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": config.qkv_bias}


def _window(config: DecoderConfig) -> int | None:
    return max((m.window for m in config.mixers if m.name == "window"), default=None)


def _layer_types(hf: PreTrainedConfig) -> tuple[MixerConfig, ...]:
    mixers = {"full_attention": MixerConfig()}
    if hf.sliding_window is not None:
        mixers["sliding_attention"] = MixerConfig(name="window", window=hf.sliding_window)
    unknown = set(hf.layer_types) - set(mixers)
    if unknown:
        raise UnsupportedModel(
            f"layer types {sorted(unknown)} are not supported; supported: full_attention, and "
            "sliding_attention with use_sliding_window and a sliding_window"
        )
    return tuple(mixers[kind] for kind in hf.layer_types)


def _read_gpt2(hf: PreTrainedConfig) -> DecoderConfig:
    if hf.add_cross_attention or hf.scale_attn_by_inverse_layer_idx or not hf.scale_attn_weights:
        raise UnsupportedModel(
            "this gpt2 has add_cross_attention, scale_attn_by_inverse_layer_idx or no "
            "scale_attn_weights; linspec supports gpt2 without these"
        )
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        width=hf.n_embd,
        layers=hf.n_layer,
        heads=hf.n_head,
        kv_heads=hf.n_head,
        head_width=hf.n_embd // hf.n_head,
        mlp_width=hf.n_inner or 4 * hf.n_embd,
        family=hf.model_type,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        activation=activation_here(hf.activation_function),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=hf.tie_word_embeddings,
        positions="learned",
        max_positions=hf.n_positions,
        bos_id=hf.bos_token_id,
        eos_ids=read_ids(hf.eos_token_id),
        pad_id=hf.pad_token_id,
    )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "tie_word_embeddings": config.tied_embeddings,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_positions,
        "activation_function": activation_there(config, "gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
    }


LLAMA_RULES = (
    Rule("model.embed_tokens", ("embed",)),
    Rule("model.layers.{}.input_layernorm", ("blocks.{}.mixer_norm",)),
    Rule("model.layers.{}.self_attn.q_proj", ("blocks.{}.mixer.q",)),
    Rule("model.layers.{}.self_attn.k_proj", ("blocks.{}.mixer.k",)),
    Rule("model.layers.{}.self_attn.v_proj", ("blocks.{}.mixer.v",)),
    Rule("model.layers.{}.self_attn.o_proj", ("blocks.{}.mixer.o",)),
    Rule("model.layers.{}.self_attn.q_norm", ("blocks.{}.mixer.q_norm",)),
    Rule("model.layers.{}.self_attn.k_norm", ("blocks.{}.mixer.k_norm",)),
    Rule("model.layers.{}.post_attention_layernorm", ("blocks.{}.mlp_norm",)),
    Rule("model.layers.{}.mlp.gate_proj", ("blocks.{}.mlp.gate",)),
    Rule("model.layers.{}.mlp.up_proj", ("blocks.{}.mlp.up",)),
    Rule("model.layers.{}.mlp.down_proj", ("blocks.{}.mlp.down",)),
    Rule("model.norm", ("norm",)),
    Rule("lm_head", ("head",)),
)
GPT2_RULES = (
    Rule("transformer.wte", ("embed",)),
    Rule("transformer.wpe", ("embed_positions",)),
    Rule("transformer.h.{}.ln_1", ("blocks.{}.mixer_norm",)),
    Rule(
        "transformer.h.{}.attn.c_attn",
        ("blocks.{}.mixer.q", "blocks.{}.mixer.k", "blocks.{}.mixer.v"),
        transposed=True,
    ),
    Rule("transformer.h.{}.attn.c_proj", ("blocks.{}.mixer.o",), transposed=True),
    Rule("transformer.h.{}.ln_2", ("blocks.{}.mlp_norm",)),
    Rule("transformer.h.{}.mlp.c_fc", ("blocks.{}.mlp.up",), transposed=True),
    Rule("transformer.h.{}.mlp.c_proj", ("blocks.{}.mlp.down",), transposed=True),
    Rule("transformer.ln_f", ("norm",)),
    Rule("lm_head", ("head",)),
)

_LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    rules=LLAMA_RULES,
    read=_read_llama,
    write=_write_llama,
    ignored=(".rotary_emb.inv_freq", "lm_head.weight"),
)
_FAMILIES = (
    _LLAMA,
    replace(
        _LLAMA,
        name="mistral",
        architecture="MistralForCausalLM",
        read=_read_mistral,
        write=_write_mistral,
    ),
    replace(
        _LLAMA, name="qwen2", architecture="Qwen2ForCausalLM", read=_read_qwen2, write=_write_qwen2
    ),
    replace(
        _LLAMA, name="qwen3", architecture="Qwen3ForCausalLM", read=_read_qwen3, write=_write_qwen3
    ),
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        rules=GPT2_RULES,
        read=_read_gpt2,
        write=_write_gpt2,
        ignored=(".attn.bias", ".attn.masked_bias", "lm_head.weight"),
    ),
    BERT,
    T5,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
