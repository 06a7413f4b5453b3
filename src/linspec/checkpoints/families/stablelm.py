"""StableLM 2: LayerNorms and a quarter of each head turned; the 12B model has parallel residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, Rule, register
from linspec.checkpoints.families.ropes import read_rope
from linspec.checkpoints.families.shared import (
    GATED_RULES,
    IGNORED,
    NORM_RULES,
    OUTER_RULES,
    PROJECTION_RULES,
    read_decoder,
    write_decoder,
)
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAMES = {"norm_eps": "layer_norm_eps", "activation": "hidden_act"}


def _read(hf: PreTrainedConfig) -> DecoderConfig:
    return read_decoder(
        hf,
        NAMES,
        norm="layer",
        qkv_bias=hf.use_qkv_bias,
        qk_norm=hf.qk_layernorm,
        qk_norm_of="each" if hf.qk_layernorm else "head",
        residual="parallel-shared" if hf.use_parallel_residual else "sequential",
        rope=read_rope(hf, partial=True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_decoder(config, NAMES) | {
        "use_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "use_parallel_residual": config.residual == "parallel-shared",
        # always, for it is 0.25 where it is left out
        "partial_rotary_factor": config.rope.partial_rotary_factor,
    }


_LAYER, _BLOCK = "model.layers.{}.", "blocks.{}."
STABLELM = register(
    Family(
        name="stablelm",
        architecture="StableLmForCausalLM",
        prefix="model.",
        rules=(
            *OUTER_RULES,
            *NORM_RULES,
            *PROJECTION_RULES,
            Rule(f"{_LAYER}self_attn.q_layernorm.norms.*", (f"{_BLOCK}mixer.q_norm",)),
            Rule(f"{_LAYER}self_attn.k_layernorm.norms.*", (f"{_BLOCK}mixer.k_norm",)),
            *GATED_RULES,
        ),
        read=_read,
        write=_write,
        ignored=IGNORED,
    )
)
