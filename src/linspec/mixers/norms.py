"""Norms of the model width and of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from linspec.mixers.config import StackConfig


class OffsetRMSNorm(nn.RMSNorm):
    """x · (1 + w) / sqrt(mean(x²) + ε), as Gemma keeps its weights: a new one has zeros."""

    def reset_parameters(self) -> None:
        """Weights that change nothing."""
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # in bfloat16, 1 + w would lose most of w
        wide = x.float() if x.dtype.itemsize < 4 else x
        weight = 1 + self.weight.to(wide.dtype)
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)


class EachHeadNorm(nn.Module):
    """A LayerNorm without bias for each head: x [..., H, K] with weights [H, K]."""

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class WholeNorm(nn.RMSNorm):
    """An RMS norm over all heads together: x [..., H, K] with weights [H K]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view(x.shape)


WeightedNorm = nn.RMSNorm | EachHeadNorm


def make_rms_norm(config: StackConfig, width: int) -> nn.RMSNorm:
    """An RMS norm over `width` features with the configured kind of weights."""
    kind = OffsetRMSNorm if config.norm_offset else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


def make_norm(config: StackConfig) -> nn.Module:
    """The configured normalisation over the model width."""
    if config.norm == "rms":
        return make_rms_norm(config, config.width)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


def make_qk_norm(config: StackConfig, heads: int) -> WeightedNorm:
    """The configured normalisation of the queries, or of the keys, of `heads` heads: [..., H, K]."""
    if config.qk_norm_of == "each":
        return EachHeadNorm(heads, config.head_width, config.norm_eps)
    if config.qk_norm_of == "whole":
        return WholeNorm(heads * config.head_width, eps=config.norm_eps)
    return make_rms_norm(config, config.head_width)
