"""A decoder described to the kernels: the one file that knows modules and plans.

plan = step_plan(model)
print(untold(model.config))           # settings that no plan tells
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from linspec.kernels.step_plan import (
    LayerPlan,
    LinearPlan,
    NormPlan,
    RotaryPlan,
    StepPlan,
)
from linspec.mixers.norms import EachHeadNorm, OffsetRMSNorm
from linspec.mixers.rope import inverse_frequencies
from linspec.mixers.rope_config import RopeConfig
from linspec.models.arranged_block import ArrangedBlock
from linspec.models.block_embedding import BlockEmbedding
from linspec.models.config import DecoderConfig
from linspec.models.fused_block import BorrowedEmbedding, FusedBlock
from linspec.models.native_linear import NativeLinear
from linspec.models.norm import InferenceRMSNorm
from linspec.models.skipped import whole

if TYPE_CHECKING:
    from linspec.models.decoder import Decoder


# settings that a plan tells, or that change nothing that is computed in a step
_TOLD = """
    vocab_size width layers heads kv_heads head_width mlp_width mixers family
    norm norm_eps norms norm_offset activation gated_mlp qkv_bias out_bias mlp_bias qk_norm qk_norm_of
    positions rope relative layer_ropes local_rope scaled_scores score_factor score_cap
    residual residual_scale embedding_scale logit_scale logit_cap
    max_positions tied_embeddings pad_id bos_id eos_ids
    mask_id logit_shift block_length
    """
TOLD = frozenset(_TOLD.split())


def step_plan(model: Decoder) -> StepPlan:
    """A model of plain blocks, in its inference form, as kernels see it."""
    config = model.config
    ropes = (config.rope, config.local_rope) if config.positions == "rope" else ()
    learned = config.positions == "learned"
    norm = _norm(model.norm)
    assert norm is not None, "a decoder has a final norm"
    return StepPlan(
        layers=tuple(_layer(model, at) for at in range(config.layers)),
        width=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        mlp_width=config.mlp_width,
        vocabulary=config.vocab_size,
        norm_eps=config.norm_eps,
        activation=config.activation,
        gated_mlp=config.gated_mlp,
        embedding=_embedding(model.embed),
        embedding_scale=config.embedding_scale,
        position_rows=model.embed_positions.weight.float() if learned else None,
        rotaries=tuple(_rotary(rope, config.head_width) for rope in ropes if rope is not None),
        residual_scale=config.residual_scale,
        score_scale=config.score_scale,
        score_cap=config.score_cap,
        final_norm=norm,
        logit_scale=config.logit_scale,
        logit_cap=config.logit_cap,
        head=_linear(model.head),
        token_norm=_token_norm(model),
        causal=config.causal,
    )


def untold(config: DecoderConfig) -> tuple[str, ...]:
    """Settings that no plan tells and that are not as usual, so that no kernel computes without them."""
    return tuple(
        each.name
        for each in fields(config)
        if each.name not in TOLD and getattr(config, each.name) != each.default
    )


def _layer(model: Decoder, at: int) -> LayerPlan:
    block, config = model.layers[at], model.config
    mixer, mlp = whole(block.mixer), whole(block.mlp)
    mixer_norm, mlp_norm = _norm(block.mixer_norm), _norm(block.mlp_norm)
    arranged = block if isinstance(block, ArrangedBlock) else None
    if arranged is not None and arranged.shared:
        mlp_norm = mixer_norm
    ropes = config.layer_ropes or ("main",) * config.layers
    table = {"main": 0, "local": 1, "none": None}[ropes[at]]
    return LayerPlan(
        mixer=mixer.mixer.name,
        parts=mixer.part_plans(),
        mixer_norm=mixer_norm,
        mlp_norm=mlp_norm,
        mixer_out_norm=_norm(arranged.mixer_out_norm) if arranged else None,
        mlp_out_norm=_norm(arranged.mlp_out_norm) if arranged else None,
        q_norm=_norm(mixer.q_norm) if config.qk_norm else None,
        k_norm=_norm(mixer.k_norm) if config.qk_norm else None,
        rotary=table if config.positions == "rope" else None,
        parallel=arranged is not None and arranged.parallel,
        conv_weights=mixer.taps if mixer.mixer.taps else None,
        qkv=_linear(mixer.qkv),
        out=_linear(mixer.o),
        up=_linear(mlp.gate_up if mlp.gated else mlp.up),
        down=_linear(mlp.down),
        mixes=mixer is block.mixer,
        feeds=mlp is block.mlp,
    )


def _linear(layer: nn.Module | None) -> LinearPlan | None:
    return layer.plan() if isinstance(layer, NativeLinear) else None


def _token_norm(model: Decoder) -> NormPlan | None:
    """That of the layers of a decoder that reads tokens beside states, which have it in common."""
    first = model.layers[0]
    return _norm(first.token_norm) if isinstance(first, FusedBlock) else None


def _embedding(table: nn.Module) -> torch.Tensor | LinearPlan:
    table = table.source if isinstance(table, BorrowedEmbedding) else table
    return table.plan() if isinstance(table, BlockEmbedding) else cast(torch.Tensor, table.weight)


def _rotary(rope: RopeConfig, head_width: int) -> RotaryPlan:
    return RotaryPlan(inverse_frequencies(rope, head_width), rope.attention_factor)


def _norm(norm: nn.Module) -> NormPlan | None:
    """A norm as kernels see it; None where the block has another one, or none."""
    if isinstance(norm, nn.Identity):
        return None
    weight = norm.get_parameter("weight").detach()
    if isinstance(norm, InferenceRMSNorm):
        return NormPlan(norm.factors)
    if isinstance(norm, OffsetRMSNorm):
        return NormPlan(1 + weight)
    if isinstance(norm, nn.LayerNorm):
        return NormPlan(weight, norm.bias.detach(), centred=True)
    return NormPlan(weight, centred=isinstance(norm, EachHeadNorm))
