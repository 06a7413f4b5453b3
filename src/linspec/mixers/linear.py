"""Grouped linear attention: exact for the last few groups, a running sum over the groups before.

The linear mixers of the core differ in their feature map, in how products of rows within reach become
weights, and in whether closed groups are summed; everything else is here once. With group size G,
g(t) = t // G and a span of n groups, the rows within reach of t are those of the groups
g(t) - n + 1 .. g(t), and S_t sums φ(k_s) v_sᵀ over all groups before them (float32). Groups are those
of the absolute position, so a token tree may cross one or several borders: rows of a group that
closes inside the tree count as summed for the nodes behind the border, exactly as they will after the
commit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.config import MixerConfig, StackConfig
from linspec.layout import Layout
from linspec.mixers.base import Mixer
from linspec.mixers.blocks import join, masked_softmax, split, windows
from linspec.state import RowSpec

# ‖x‖ below this is treated as this: padding rows are all zero and must stay zero
NORM_FLOOR = 1e-6


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / ‖x‖ over the last dimension."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


class GroupedLinear(Mixer):
    """Base of the grouped mixers: a feature map, weights within reach, a scale on the sum."""

    summed = True
    biased = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        # with the pretrained weights within reach, rows keep the keys that these weights need
        self.exact = mixer.kernel == "softmax"

    def row_spec(self) -> RowSpec:
        return RowSpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            lead=max(0, self.mixer.taps - 1),
            group=self.mixer.group,
            span=self.mixer.span,
            sum_width=self.head_width if self.summed else 0,
        )

    # ---- what a grouped mixer defines

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """φ of queries and keys [..., K] -> [..., K]."""
        return unit(x)

    def in_group(self, products: torch.Tensor) -> torch.Tensor | None:
        """Weights of rows within reach from φ(q)·φ(k); None when the mixer does not see them."""
        return products.relu().square()

    def sum_scale(self) -> torch.Tensor | float | None:
        """Factor on the sum over closed groups; None when the mixer keeps no sums."""
        return None

    # ---- what follows from it

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.exact else self.feature_map(x)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        return self.feature_map(k) if self.exact else k

    def near_queries(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become before they meet the rows within reach."""
        return q

    def summed_queries(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become before they read the sums."""
        return self.feature_map(q) if self.exact else q

    def near(
        self,
        products: torch.Tensor,
        seen: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Weights of rows from q·k products; `seen` is false at rows out of reach, None if all count.

        bias: of relative positions. It joins the scores of a softmax and the weights of other
        kernels, as in You et al. 2024.
        """
        if self.exact:
            scores = products * self.config.score_scale
            return masked_softmax(scores if bias is None else scores + bias, seen)
        weights = self.in_group(products)
        if weights is not None and bias is not None:
            weights = weights + bias
        return weights if weights is None or seen is None else weights.masked_fill(~seen, 0.0)

    # ---- step form

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: Layout,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        key = ("group", self.mixer.group, self.mixer.span)
        near, beyond = layout.memo(key, lambda: self._groups(layout))
        flat = q.flatten(2, 3)
        bias = None if self.relative is None else self.step_bias(self.relative, layout)
        weights = self.near(
            (self.near_queries(flat) @ keys.mT).unflatten(2, q.shape[2:4]), near, bias
        )
        o = torch.zeros_like(flat) if weights is None else weights.flatten(2, 3) @ values
        scale = self.sum_scale()
        if scale is not None and sums is not None:
            flat = self.summed_queries(flat)
            o = o + (scale * (flat.to(sums.dtype) @ sums)).to(o.dtype)
            if beyond is not None:
                products = (flat @ self.summed_keys(keys).mT).unflatten(2, q.shape[2:4])
                o = o + scale * products.masked_fill(~beyond, 0.0).flatten(2, 3) @ values
        return o.unflatten(2, q.shape[2:4])

    def _groups(self, layout: Layout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows within a node's reach and rows of groups closed on its path, [R, 1, 1, N, C] each.

        None instead of a mask that is all true or all false.
        """
        oldest = (layout.offsets // self.mixer.group)[:, :, None] - (self.mixer.span - 1)
        row = (layout.columns // self.mixer.group)[:, None, :]
        near = layout.visible & (row >= oldest)
        beyond = layout.visible & (row < oldest)
        return (
            None if bool(near.all()) else near[:, None, None],
            beyond[:, None, None] if bool(beyond.any()) else None,
        )

    # ---- full form

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group, span = self.mixer.group, self.mixer.span
        blocks, before = self._query_blocks(q), (span - 1) * group
        keys = windows(k, None, before, group)
        column, row = self._block_places(keys, before)
        first = torch.arange(keys.shape[2], device=keys.device)[:, None, None] * group
        seen = (column <= row) & (column >= -first)
        weights = self._within_reach(blocks, keys, seen.repeat(1, self.repeats, 1), before)
        o = torch.zeros_like(blocks)
        if weights is not None:
            o = weights @ windows(v, None, before, group)
        scale = self.sum_scale()
        if scale is not None:
            closed = self._closed_sums(split(k, group), split(v, group), sums)
            o = o + scale * (self.summed_queries(blocks) @ closed.to(blocks.dtype))
        return join(o, self.repeats, q.shape[2])

    def _query_blocks(self, q: torch.Tensor) -> torch.Tensor:
        """Queries of the heads that share a key, by group: [B, H, T, K] -> [B, Hkv, n, rep * G, K]."""
        blocks = split(q, self.mixer.group).unflatten(1, (self.kv_heads, self.repeats))
        return blocks.transpose(2, 3).flatten(3, 4)

    def _block_places(self, keys: torch.Tensor, before: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the columns [C] and rows [G, 1] of a block, from its first token on."""
        column = torch.arange(keys.shape[3], device=keys.device) - before
        return column, torch.arange(self.mixer.group, device=keys.device)[:, None]

    def _within_reach(
        self, blocks: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor, before: int
    ) -> torch.Tensor | None:
        """Weights [B, Hkv, n, rep * G, C] of the rows around each block."""
        bias = None
        if self.relative is not None:
            column, row = self._block_places(keys, before)
            bias = self.relative(self.relative.buckets(row - column))  # [H, G, C]
            bias = bias.unflatten(0, (self.kv_heads, self.repeats)).flatten(1, 2)[:, None]
        return self.near(self.near_queries(blocks) @ keys.mT, seen, bias)

    def _closed_sums(
        self, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum of φ(k) vᵀ over the groups beyond the reach of each group: [B, Hkv, n, S, V].

        float32 or wider; start [B, Hkv, S, V] are the groups closed before the sequence.
        """
        products = self._group_sums(keys, values)
        sums = self._shifted_sums(products)
        return sums if start is None else sums + start[:, :, None].to(sums.dtype)

    def _group_sums(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """φ(k) vᵀ of every group, float32 or wider: [B, Hkv, n, S, V]."""
        products = self.summed_keys(keys).mT @ values
        return products.to(torch.promote_types(products.dtype, torch.float32))

    def _shifted_sums(self, products: torch.Tensor) -> torch.Tensor:
        """Sums over the groups `span` and more before each group."""
        # shifted, not subtracted: rounding would let a group see itself
        count, span = products.shape[2], self.mixer.span
        return F.pad(products.cumsum(2), (0, 0, 0, 0, span, 0))[:, :, :count]

    # ---- encoder form

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Every token sees span - 1 groups to either side exactly, and the others as a sum."""
        group, reach = self.mixer.group, (self.mixer.span - 1) * self.mixer.group
        blocks, keys = self._query_blocks(q), windows(k, None, reach, group, reach)
        if real is None:
            real = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
        seen = windows(real[:, None, :, None].byte(), None, reach, group, reach).mT.bool()
        # a group of padding sees padding: a softmax over nothing is NaN, also in its gradient
        weights = self._within_reach(blocks, keys, seen | ~seen.any(-1, keepdim=True), reach)
        o = torch.zeros_like(blocks)
        if weights is not None:
            o = weights @ windows(v, None, reach, group, reach)
        scale = self.sum_scale()
        if scale is not None:
            sums = self._distant_sums(split(k, group), split(v, group), alone=weights is None)
            o = o + scale * (self.summed_queries(blocks) @ sums.to(blocks.dtype))
        return join(o, self.repeats, q.shape[2])

    def _distant_sums(
        self, keys: torch.Tensor, values: torch.Tensor, *, alone: bool
    ) -> torch.Tensor:
        """Sum of φ(k) vᵀ over all groups that a group does not see exactly: [B, Hkv, n, S, V].

        alone: there is no exact part, so a group's sum has the group itself too, as in FLASH.
        """
        products = self._group_sums(keys, values)
        if alone:
            return products.sum(2, keepdim=True)
        earlier = self._shifted_sums(products)
        return earlier + self._shifted_sums(products.flip(2)).flip(2)
