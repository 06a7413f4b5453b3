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

from linspec.config import DecoderConfig, MixerConfig
from linspec.layout import Layout
from linspec.mixers.base import Mixer, NativeForm
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

    def __init__(self, config: DecoderConfig, mixer: MixerConfig) -> None:
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

    def _native_groups(self, alpha: float) -> NativeForm:
        """The C form of weights that are this class's own."""
        mixer = self.mixer
        return NativeForm(0, mixer.group, mixer.span, not self.exact, alpha)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.exact else self.feature_map(x)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        return self.feature_map(k) if self.exact else k

    def summed_queries(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become before they read the sums."""
        return self.feature_map(q) if self.exact else q

    def near(self, products: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor | None:
        """Weights of rows from q·k products; `seen` is false at rows out of reach, None if all count."""
        if self.exact:
            return masked_softmax(products * self.head_width**-0.5, seen)
        weights = self.in_group(products)
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
        weights = self.near((flat @ keys.mT).unflatten(2, q.shape[2:4]), near)
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
        group, time = self.mixer.group, q.shape[2]
        # queries of the heads that share a key: [B, Hkv, n, rep * G, K]
        blocks = split(q, group).unflatten(1, (self.kv_heads, self.repeats))
        blocks = blocks.transpose(2, 3).flatten(3, 4)
        before = (self.mixer.span - 1) * group
        o = torch.zeros_like(blocks)
        weights = self._within_reach(blocks, windows(k, None, before, group))
        if weights is not None:
            o = weights @ windows(v, None, before, group)
        scale = self.sum_scale()
        if scale is not None:
            closed = self._closed_sums(split(k, group), split(v, group), sums)
            o = o + scale * (self.summed_queries(blocks) @ closed.to(blocks.dtype))
        return join(o, self.repeats, time)

    def _within_reach(self, blocks: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Weights [B, Hkv, n, rep * G, C] of the rows of each block and the span before it."""
        group, reach = self.mixer.group, keys.shape[3]
        row = torch.arange(group, device=keys.device)[:, None]
        column = torch.arange(reach, device=keys.device) - (reach - group)
        first = torch.arange(keys.shape[2], device=keys.device)[:, None, None] * group
        seen = (column <= row) & (column >= -first)
        return self.near(blocks @ keys.mT, seen.repeat(1, self.repeats, 1))

    def _closed_sums(
        self, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum of φ(k) vᵀ over the groups beyond the reach of each group: [B, Hkv, n, S, V].

        float32 or wider; start [B, Hkv, S, V] are the groups closed before the sequence.
        """
        products = self.summed_keys(keys).mT @ values
        products = products.to(torch.promote_types(products.dtype, torch.float32))
        # shifted, not subtracted: rounding would let a group see itself
        count, span = products.shape[2], self.mixer.span
        sums = F.pad(products.cumsum(2), (0, 0, 0, 0, span, 0))[:, :, :count]
        return sums if start is None else sums + start[:, :, None].to(sums.dtype)
