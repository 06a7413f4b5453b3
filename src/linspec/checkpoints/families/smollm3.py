"""SmolLM3: Llama in which every fourth layer has no rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, register
from linspec.checkpoints.families.shared import (
    IGNORED,
    LLAMA_RULES,
    layer_types,
    read_decoder,
    window_of,
    write_decoder,
    written_layer_types,
)
from linspec.errors import ConfigError
from linspec.models.config import DecoderConfig
from linspec.utils.messages import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _read(hf: PreTrainedConfig) -> DecoderConfig:
    turns = hf.no_rope_layers
    if set(turns) - {0, 1} or len(turns) != hf.num_hidden_layers:
        raise ConfigError(
            f"no_rope_layers must be a list of 0 and 1 for each of {hf.num_hidden_layers} layers, got "
            f"{shown(turns)}"
        )
    bias = hf.attention_bias
    return read_decoder(
        hf,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.mlp_bias,
        mixers=layer_types(hf),
        # 1 is a layer that has them, whatever the name says
        layer_ropes=() if all(turns) else tuple("main" if one else "none" for one in turns),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    window = window_of(config)
    ropes = config.layer_ropes or ("main",) * config.layers
    return write_decoder(config) | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(name == "main") for name in ropes],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": written_layer_types(config),
    }


SMOLLM3 = register(
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        prefix="model.",
        rules=LLAMA_RULES,
        read=_read,
        write=_write,
        ignored=IGNORED,
    )
)
