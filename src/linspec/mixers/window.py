"""Sliding-window softmax attention (Child et al. 2019; Mistral): a cache of bounded length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.carry import Carry
from linspec.mixers.options import WindowOptions
from linspec.mixers.softmax import Softmax
from linspec.state.contract import LayerState, StateOptions
from linspec.state.registry import entry_format
from linspec.state.window import WindowCache, WindowSpec


@MIXERS.register(
    "window",
    summary="softmax attention over the last `window` tokens",
    paper="Child et al. 2019, arXiv 1904.10509",
    state="2·window·d per KV head",
    cost="2·window·d per token",
    options=WindowOptions,
)
class Window(Softmax):
    """Softmax over the current token and the window - 1 tokens before it."""

    def state_spec(self) -> WindowSpec:
        return WindowSpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            conv_history=max(0, self.mixer.taps - 1),
            window=self.mixer.window,
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        return WindowCache(
            self.state_spec(), len(layers), slots, options, entries=entry_format(options)
        )

    def carry(self) -> Carry:
        return Carry(span=self.mixer.window)

    def attention_plan(self) -> AttentionPlan | None:
        if type(self) is not Window:
            return None
        return AttentionPlan(window=self.mixer.window, bias=self.planned_bias())

    def mask(self, tree_mask: TreeMask) -> torch.Tensor | None:
        size = self.mixer.window

        def inside() -> torch.Tensor:
            distance = tree_mask.offsets[:, :, None] - tree_mask.columns[:, None, :]
            return tree_mask.visible & (distance < size)

        found: torch.Tensor = tree_mask.memo(("window", size), inside)
        return found

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.over(q, k, v, self._inside(q, later=False))

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        # a padding token sees itself, if nothing else: a softmax over nothing is NaN, and its gradient
        # would reach the weights
        mask = self._inside(q, later=True)
        if real is not None:
            alone = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
            mask = (mask & real[:, None, None]) | alone
        return self.over(q, k, v, mask)

    def _inside(self, q: torch.Tensor, *, later: bool) -> torch.Tensor:
        """[T, T]: keys less than `window` tokens away, those after the query only if `later`."""
        at = torch.arange(q.shape[2], device=q.device)
        distance = at[:, None] - at
        inside = distance.abs() < self.mixer.window
        return inside if later else inside & (distance >= 0)
