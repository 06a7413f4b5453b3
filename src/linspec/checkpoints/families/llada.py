"""LLaDA: Llama's layers without the causal mask, under the names of OLMo's first code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, Rule, activation_there, register
from linspec.checkpoints.families.shared import read_as
from linspec.errors import UnsupportedModel
from linspec.models.diffusion_config import DiffusionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# theirs: what a Llama calls it, and their default
_NAMES = {
    "d_model": ("hidden_size", 768),
    "n_heads": ("num_attention_heads", 12),
    "n_layers": ("num_hidden_layers", 12),
    "max_sequence_length": ("max_position_embeddings", 1024),
    "activation_type": ("hidden_act", "swiglu"),
    "rms_norm_eps": ("rms_norm_eps", 1e-5),
    "weight_tying": ("tie_word_embeddings", True),
    "include_bias": ("mlp_bias", True),
}
# settings that change what is computed: the only value of each that a decoder here can have
_FIXED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "clip_qkv": None,
    "scale_logits": False,
    "input_emb_norm": False,
    "bias_for_layer_norm": False,
}
# what _FIXED is where config.json leaves it out and it is another
_DEFAULTS = {"block_type": "sequential", "layer_norm_type": "default", "rope": False}


def _settings(**fields: Any) -> PreTrainedConfig:
    """Their settings under Llama's names; what they say beside these stays as it is."""
    from transformers import LlamaConfig

    named = {ours: fields.get(theirs, default) for theirs, (ours, default) in _NAMES.items()}
    heads = named["num_attention_heads"]
    kv_heads = fields.get("n_kv_heads") or (1 if fields.get("multi_query_attention") else heads)
    width = fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * named["hidden_size"]
    named |= {"num_key_value_heads": kv_heads, "intermediate_size": width}
    shared = ("vocab_size", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id")
    named |= {"rope_theta": 10000.0, "bos_token_id": None}
    hf = LlamaConfig(**named | {key: fields[key] for key in shared if key in fields})
    for key, value in _FIXED.items():
        setattr(hf, key, fields.get(key, _DEFAULTS.get(key, value)))
    hf.embedding_size = fields.get("embedding_size") or hf.vocab_size
    hf.include_qkv_bias = bool(fields.get("include_qkv_bias") or named["mlp_bias"])
    hf.mask_token_id = fields["mask_token_id"]
    return hf


def _read(hf: PreTrainedConfig) -> DiffusionConfig:
    for key, value in (*_FIXED.items(), ("embedding_size", hf.vocab_size)):
        found = getattr(hf, key)
        if found != value and not (found is None and value is False):
            raise UnsupportedModel(
                f"{key} {found!r} is not supported in a model of family llada; supported: {value!r}"
            )
    return read_as(
        DiffusionConfig,
        hf,
        family="llada",
        qkv_bias=hf.include_qkv_bias,
        out_bias=hf.mlp_bias,
        mlp_bias=hf.mlp_bias,
        mask_id=hf.mask_token_id,
    )


def _write(config: DiffusionConfig) -> dict[str, Any]:
    return {
        **_FIXED,
        "d_model": config.width,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "n_layers": config.layers,
        "mlp_hidden_size": config.mlp_width,
        "embedding_size": config.vocab_size,
        "max_sequence_length": config.max_positions,
        "activation_type": activation_there(config, "gelu_new"),
        "rms_norm_eps": config.norm_eps,
        "weight_tying": config.tied_embeddings,
        "include_bias": config.mlp_bias,
        "include_qkv_bias": config.qkv_bias,
        "rope_theta": config.rope.theta,
        "mask_token_id": config.mask_id,
    }


_LAYER, _BLOCK = "model.transformer.blocks.{}.", "blocks.{}."
_LAYERS = {
    **{f"{name}_proj": f"mixer.{name}" for name in "qkv"},
    "attn_out": "mixer.o",
    "attn_norm": "mixer_norm",
    "ff_norm": "mlp_norm",
    "ff_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "ff_out": "mlp.down",
}
LLADA = register(
    Family(
        name="llada",
        architecture="LLaDAModelLM",
        prefix="model.",
        rules=(
            Rule("model.transformer.wte", ("embed",)),
            Rule("model.transformer.ln_f", ("norm",)),
            Rule("model.transformer.ff_out", ("head",)),
            *(Rule(_LAYER + theirs, (_BLOCK + ours,)) for theirs, ours in _LAYERS.items()),
        ),
        read=_read,
        write=_write,
        ignored=("model.transformer.ff_out.weight",),
        settings=_settings,
    )
)
