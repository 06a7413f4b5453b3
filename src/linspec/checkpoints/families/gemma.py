"""Gemma 2 and Gemma 3 (text): norms on both sides, weights of norms kept as w - 1, scaled embeddings.

Gemma 2 caps scores and logits. Gemma 3 has norms of queries and keys, and turns layers that see a window
faster than those that see everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, Rule, positive, register
from linspec.checkpoints.families.ropes import read_rope, rope_parameters, write_rope
from linspec.checkpoints.families.shared import (
    ATTENTION_RULES,
    GATED_RULES,
    IGNORED,
    OUTER_RULES,
    layer_types,
    read_decoder,
    window_of,
    write_decoder,
    written_layer_types,
)
from linspec.errors import UnsupportedModel
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAMES = {"norm_eps": "rms_norm_eps", "activation": "hidden_activation"}
# what says nothing in a layer without a window
_UNUSED_WINDOW = 4096


def _read(hf: PreTrainedConfig, **own: Any) -> DecoderConfig:
    """What both have."""
    if hf.use_bidirectional_attention:
        raise UnsupportedModel(
            "use_bidirectional_attention is not supported; linspec decodes models in which no token sees a "
            "later one"
        )
    bias = hf.attention_bias
    cap = hf.final_logit_softcapping
    return read_decoder(
        hf,
        NAMES,
        qkv_bias=bias,
        out_bias=bias,
        norms="both",
        norm_offset=True,
        embedding_scale=hf.hidden_size**0.5,
        score_factor=positive(hf, "query_pre_attn_scalar") ** -0.5,
        logit_cap=0.0 if cap is None else positive(hf, "final_logit_softcapping"),
        mixers=layer_types(hf),
        **own,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    # the root of a whole number is not always one when it is squared again
    scalar = round(config.score_scale**-2, 6)
    return write_decoder(config, NAMES) | {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "final_logit_softcapping": config.logit_cap or None,
        "sliding_window": window_of(config) or _UNUSED_WINDOW,
        "layer_types": written_layer_types(config),
    }


def _read_gemma2(hf: PreTrainedConfig) -> DecoderConfig:
    cap = hf.attn_logit_softcapping
    return _read(hf, score_cap=0.0 if cap is None else positive(hf, "attn_logit_softcapping"))


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return _write(config) | {"attn_logit_softcapping": config.score_cap or None}


def _read_gemma3(hf: PreTrainedConfig) -> DecoderConfig:
    if hf.attn_logit_softcapping is not None:
        raise UnsupportedModel(
            f"attn_logit_softcapping {hf.attn_logit_softcapping} is not supported in gemma3, whose attention "
            "in transformers does not read it; leave it out"
        )
    ropes = {"full_attention": "main", "sliding_attention": "local"}
    local = "sliding_attention" in hf.layer_types
    theirs = hf.rope_parameters
    return _read(
        hf,
        qk_norm=True,
        rope=read_rope(hf, data=theirs["full_attention"]),
        local_rope=read_rope(hf, data=theirs["sliding_attention"]) if local else None,
        layer_ropes=tuple(ropes[kind] for kind in hf.layer_types) if local else (),
    )


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    found = _write(config)
    # the style of older readers has one kind of positions
    for name in write_rope(config.rope):
        del found[name]
    ropes = {"full_attention": config.rope, "sliding_attention": config.local_rope}
    named = {kind: rope_parameters(rope) for kind, rope in ropes.items() if rope is not None}
    return found | {"rope_parameters": named}


_LAYER, _BLOCK = "model.layers.{}.", "blocks.{}."
RULES = (
    *OUTER_RULES,
    Rule(f"{_LAYER}input_layernorm", (f"{_BLOCK}mixer_norm",)),
    Rule(f"{_LAYER}post_attention_layernorm", (f"{_BLOCK}mixer_out_norm",)),
    Rule(f"{_LAYER}pre_feedforward_layernorm", (f"{_BLOCK}mlp_norm",)),
    Rule(f"{_LAYER}post_feedforward_layernorm", (f"{_BLOCK}mlp_out_norm",)),
    *ATTENTION_RULES,
    *GATED_RULES,
)
GEMMA2 = register(
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        prefix="model.",
        rules=RULES,
        read=_read_gemma2,
        write=_write_gemma2,
        ignored=IGNORED,
    )
)
GEMMA3 = register(
    Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        prefix="model.",
        rules=RULES,
        read=_read_gemma3,
        write=_write_gemma3,
        ignored=IGNORED,
    )
)
