"""Sliding-window softmax attention (Child et al. 2019; Mistral): a cache of bounded length."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from linspec.layout import Layout
from linspec.mixers.base import MIXERS, NativeForm
from linspec.mixers.softmax import Softmax
from linspec.state import RowSpec


@MIXERS.register(
    "window",
    summary="softmax attention over the last `window` tokens",
    paper="Child et al. 2019, arXiv 1904.10509",
    state="2·window·d per KV head",
    direction="causal",
    cost="2·window·d per token",
)
class Window(Softmax):
    """Softmax over the current token and the window - 1 tokens before it."""

    def row_spec(self) -> RowSpec:
        return replace(super().row_spec(), window=self.mixer.window)

    def native_form(self) -> NativeForm | None:
        return NativeForm(window=self.mixer.window) if type(self) is Window else None

    def mask(self, layout: Layout) -> torch.Tensor | None:
        size = self.mixer.window

        def near() -> torch.Tensor:
            distance = layout.offsets[:, :, None] - layout.columns[:, None, :]
            return layout.visible & (distance < size)

        found: torch.Tensor = layout.memo(("window", size), near)
        return found

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        distance = at[:, None] - at
        mask = (distance >= 0) & (distance < self.mixer.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.repeats > 1)
