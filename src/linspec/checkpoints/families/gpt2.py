"""GPT-2 (Radford et al. 2019): learned positions, transposed matrices, q, k and v in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import (
    Family,
    Rule,
    activation_here,
    activation_there,
    read_ids,
    register,
)
from linspec.errors import UnsupportedModel
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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

GPT2 = register(
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        rules=GPT2_RULES,
        read=_read_gpt2,
        write=_write_gpt2,
        ignored=(".attn.bias", ".attn.masked_bias", "lm_head.weight"),
    )
)
