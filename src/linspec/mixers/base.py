"""What every mixer shares: projections, rotary positions, the causal convolution over values."""

from __future__ import annotations

import torch
from torch import nn

from linspec.models.config import DecoderConfig, MixerConfig
from linspec.models.rope import rotate
from linspec.registry import Registry

Rope = tuple[torch.Tensor, torch.Tensor] | None


class Mixer(nn.Module):
    """The part of a block through which a token sees other tokens."""

    def __init__(self, config: DecoderConfig, mixer: MixerConfig) -> None:
        super().__init__()
        self.config, self.mixer = config, mixer
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        q_width, kv_width = self.heads * self.head_width, self.kv_heads * self.head_width
        self.q = nn.Linear(config.width, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(q_width, config.width, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)

    def project(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, T, D] -> q [B, H, T, K], k and v [B, Hkv, T, K]."""
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """The full form: [B, T, D] -> [B, T, D], parallel over time, differentiable."""
        q, k, v = self.project(x, rope)
        return self.o(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


MIXERS: Registry[type[Mixer]] = Registry("mixer")
