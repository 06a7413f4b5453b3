"""Queries, keys and values of all heads from the states of tokens, and the way back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from linspec.mixers.config import StackConfig
from linspec.mixers.norms import WeightedNorm, make_qk_norm

# several linear layers of one input -> one inference layer with their outputs side by side
LinearFactory = Callable[..., nn.Module]


class HeadProjections(nn.Module):
    """The linear layers of a mixer; `kv_heads` keys and values are shared by `repeats` query heads each."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.repeats = config.heads // config.kv_heads
        self.head_width = config.head_width
        q_width, kv_width = self.heads * self.head_width, self.kv_heads * self.head_width
        self.q = nn.Linear(config.width, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o: nn.Module = nn.Linear(q_width, config.width, bias=config.out_bias)
        self.qkv: nn.Module | None = None
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm: WeightedNorm = make_qk_norm(config, self.heads)
            self.k_norm: WeightedNorm = make_qk_norm(config, self.kv_heads)

    def split_heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., D] -> queries, then keys, before rotation [..., H + Hkv, K], and values [..., Hkv, V]."""
        heads = self._projections(x).unflatten(-1, (-1, self.head_width))
        both, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        if self.qk_norm:
            q, k = both.split((self.heads, self.kv_heads), dim=-2)
            both = torch.cat((self.q_norm(q), self.k_norm(k)), dim=-2)
        return both, v

    def _projections(self, x: torch.Tensor) -> torch.Tensor:
        if self.qkv is not None:
            return self.qkv(x)
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)

    def to_inference(self, linear_factory: LinearFactory) -> None:
        """Replace the projections by their inference form: one product for q, k and v."""
        self.qkv = linear_factory(self.q, self.k, self.v)
        self.o = linear_factory(self.o)
        del self.q, self.k, self.v
