"""Softmax attention (Vaswani et al. 2017): exact, with a cache that grows with the context."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import MIXERS, Mixer
from linspec.mixers.carry import Carry
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.exact import Exact, softmax_attention, softmax_weights
from linspec.mixers.options import CacheOptions
from linspec.state.contract import LayerState, StateOptions
from linspec.state.entries import EntrySpec
from linspec.state.registry import new_cache

# queries that share a mask: few, so that little is computed only to be masked
_TAIL_ROWS = 256


@MIXERS.register(
    "softmax",
    summary="causal softmax attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    state="2·T·d per KV head",
    cost="2·T·d per token",
    options=CacheOptions,
)
class Softmax(Mixer):
    """Every token attends to all tokens before it; in an encoder to all tokens."""

    biased = True
    keeps_cache = True
    static_step = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        scale, cap = config.score_scale, config.score_cap
        self.exact = Exact(partial(softmax_weights, scale=scale, cap=cap))
        self.attention = partial(softmax_attention, scale=scale, cap=cap)
        # a subclass may weigh entries in another way
        self.plain = type(self) is Softmax and self.relative is None
        self.ends_alone = self.plain and not mixer.taps
        self.steps_both_ways = not mixer.taps

    def state_spec(self) -> EntrySpec:
        return EntrySpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            conv_history=max(0, self.mixer.taps - 1),
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        return new_cache(self.state_spec(), len(layers), slots, options)

    def carry(self) -> Carry:
        return Carry(span=None)

    def attention_plan(self) -> AttentionPlan | None:
        return AttentionPlan(bias=self.planned_bias()) if type(self) is Softmax else None

    def mask(self, tree_mask: TreeMask) -> torch.Tensor | None:
        """Which positions each node attends to, [R, N, C]; None for all of them."""
        return None if tree_mask.plain else tree_mask.visible

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        bias, mask = None, self.mask(tree_mask)
        if self.relative is not None:
            bias = self.relative.nodes(tree_mask, self.kv_heads).to(q.dtype)
        seen = None if mask is None else mask[:, None, None]
        return self.exact.nodes(q, keys, values, seen, bias).unflatten(2, q.shape[2:4])

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.relative is None:
            return self.attention(q, k, v, causal=True)
        time = q.shape[2]
        return self.over(q, k, v, torch.ones(time, time, dtype=torch.bool, device=q.device).tril())

    def mix_end(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        past, ends = k.shape[2] - q.shape[2], []
        for first in range(0, q.shape[2], _TAIL_ROWS):
            queries = q[:, :, first : first + _TAIL_ROWS]
            count, time = queries.shape[2], past + first + queries.shape[2]
            mask = torch.ones(count, time, dtype=torch.bool, device=q.device).tril(time - count)
            ends.append(self.over(queries, k[:, :, :time], v[:, :, :time], mask))
        return torch.cat(ends, dim=2)

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        mask = None if real is None else real[:, None] if real.ndim == 3 else real[:, None, None]
        return self.over(q, k, v, mask)

    def over(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Softmax over the keys that `mask` (true where seen) leaves, with the position bias."""
        if self.relative is not None:
            bias = self.relative.between(q.shape[2], k.shape[2]).to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        return self.attention(q, k, v, mask=mask)
