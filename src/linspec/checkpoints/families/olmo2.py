"""OLMo 2: norms behind mixers and MLPs, and one over the queries, or keys, of all heads together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, Rule, register
from linspec.checkpoints.families.shared import (
    ATTENTION_RULES,
    GATED_RULES,
    IGNORED,
    OUTER_RULES,
    read_decoder,
    write_decoder,
)
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _read(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return read_decoder(
        hf, qkv_bias=bias, out_bias=bias, norms="behind", qk_norm=True, qk_norm_of="whole"
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_decoder(config) | {"attention_bias": config.qkv_bias}


_LAYER, _BLOCK = "model.layers.{}.", "blocks.{}."
OLMO2 = register(
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        prefix="model.",
        rules=(
            *OUTER_RULES,
            Rule(f"{_LAYER}post_attention_layernorm", (f"{_BLOCK}mixer_out_norm",)),
            Rule(f"{_LAYER}post_feedforward_layernorm", (f"{_BLOCK}mlp_out_norm",)),
            *ATTENTION_RULES,
            *GATED_RULES,
        ),
        read=_read,
        write=_write,
        ignored=IGNORED,
    )
)
