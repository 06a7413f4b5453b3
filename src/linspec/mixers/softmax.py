"""Softmax attention (Vaswani et al. 2017): exact, with a cache that grows with the context."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.layout import Layout
from linspec.mixers.base import MIXERS, Mixer, NativeForm
from linspec.mixers.blocks import masked_softmax
from linspec.state import RowSpec


@MIXERS.register(
    "softmax",
    summary="causal softmax attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    state="2·T·d per KV head",
    direction="causal",
    cost="2·T·d per token",
)
class Softmax(Mixer):
    """Every token attends to all tokens before it."""

    def row_spec(self) -> RowSpec:
        return RowSpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            lead=max(0, self.mixer.taps - 1),
        )

    def native_form(self) -> NativeForm | None:
        # a subclass may weigh rows in another way
        return NativeForm() if type(self) is Softmax else None

    def mask(self, layout: Layout) -> torch.Tensor | None:
        """Which rows each node attends to, [R, N, C]; None for all of them."""
        return None if layout.plain else layout.visible

    def weights(self, products: torch.Tensor, layout: Layout) -> torch.Tensor:
        mask = self.mask(layout)
        seen = None if mask is None else mask[:, None, None]
        return masked_softmax(products * self.head_width**-0.5, seen)

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.repeats > 1)
