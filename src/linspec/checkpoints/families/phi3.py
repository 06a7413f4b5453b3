"""Phi-3 and Phi-4-mini: fused q, k, v and fused gate and up; long texts by LongRoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, Rule, qkv_rows, register
from linspec.checkpoints.families.ropes import read_rope
from linspec.checkpoints.families.shared import (
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


def _read(hf: PreTrainedConfig) -> DecoderConfig:
    return read_decoder(hf, mixers=same_windows(hf), rope=read_rope(hf, partial=True))


def _write(config: DecoderConfig) -> dict[str, Any]:
    found = write_decoder(config) | {"sliding_window": window_of(config)}
    if config.rope.kind == "longrope":
        # transformers reads it here first
        found["original_max_position_embeddings"] = config.rope.original_max_positions
    return found


_LAYER, _BLOCK = "model.layers.{}.", "blocks.{}."
PHI3 = register(
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        prefix="model.",
        rules=(
            *OUTER_RULES,
            *NORM_RULES,
            Rule(
                f"{_LAYER}self_attn.qkv_proj",
                (f"{_BLOCK}mixer.q", f"{_BLOCK}mixer.k", f"{_BLOCK}mixer.v"),
                sizes=qkv_rows,
            ),
            Rule(f"{_LAYER}self_attn.o_proj", (f"{_BLOCK}mixer.o",)),
            Rule(f"{_LAYER}mlp.gate_up_proj", (f"{_BLOCK}mlp.gate", f"{_BLOCK}mlp.up")),
            Rule(f"{_LAYER}mlp.down_proj", (f"{_BLOCK}mlp.down",)),
        ),
        read=_read,
        write=_write,
        ignored=IGNORED,
    )
)
