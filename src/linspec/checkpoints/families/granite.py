"""Granite: Llama with four multipliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, positive, register
from linspec.checkpoints.families.shared import IGNORED, LLAMA_RULES, read_decoder, write_decoder
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _read(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return read_decoder(
        hf,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.mlp_bias,
        embedding_scale=positive(hf, "embedding_multiplier"),
        residual_scale=positive(hf, "residual_multiplier"),
        score_factor=positive(hf, "attention_multiplier"),
        logit_scale=1 / positive(hf, "logits_scaling"),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_decoder(config) | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.score_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


GRANITE = register(
    Family(
        name="granite",
        architecture="GraniteForCausalLM",
        prefix="model.",
        rules=LLAMA_RULES,
        read=_read,
        write=_write,
        ignored=IGNORED,
    )
)
