"""StarCoder2: LayerNorms, biases everywhere, a plain MLP, and a window in all layers or in none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, Rule, register
from linspec.checkpoints.families.shared import (
    ATTENTION_RULES,
    IGNORED,
    NORM_RULES,
    OUTER_RULES,
    read_decoder,
    same_windows,
    window_of,
    write_decoder,
)
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAMES = {"norm_eps": "norm_epsilon", "activation": "hidden_act"}


def _read(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.use_bias
    return read_decoder(
        hf,
        NAMES,
        norm="layer",
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        mixers=same_windows(hf),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_decoder(config, NAMES) | {
        "use_bias": config.qkv_bias,
        "sliding_window": window_of(config),
    }


_LAYER, _BLOCK = "model.layers.{}.", "blocks.{}."
STARCODER2 = register(
    Family(
        name="starcoder2",
        architecture="Starcoder2ForCausalLM",
        prefix="model.",
        rules=(
            *OUTER_RULES,
            *NORM_RULES,
            *ATTENTION_RULES,
            Rule(f"{_LAYER}mlp.c_fc", (f"{_BLOCK}mlp.up",)),
            Rule(f"{_LAYER}mlp.c_proj", (f"{_BLOCK}mlp.down",)),
        ),
        read=_read,
        write=_write,
        ignored=IGNORED,
    )
)
