"""Softmax attention (Vaswani et al. 2017): exact, with a cache that grows with the context."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.mixers.base import MIXERS, Mixer


@MIXERS.register("softmax", summary="causal softmax attention", paper="Vaswani et al. 2017, arXiv 1706.03762")
class Softmax(Mixer):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
