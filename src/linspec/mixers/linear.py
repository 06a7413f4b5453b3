"""Grouped linear attention: exact inside a group, a running sum over the groups before.

The five linear mixers of the core differ in their feature map, in how products inside a group become
weights, and in whether closed groups are summed; everything else is here once. With group size G and
g(t) = t // G, S_g sums k_s v_sᵀ over all earlier groups (float32). Groups are those of the absolute
position (plus the layer's shift), so a token tree may cross one or several borders: rows of a group
that closes inside the tree count as summed for the nodes behind the border, exactly as they will
after the commit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.layout import Layout
from linspec.mixers.base import Mixer
from linspec.mixers.blocks import join, split
from linspec.state import RowSpec

# ‖x‖ below this is treated as this: padding rows are all zero and must stay zero
NORM_FLOOR = 1e-6


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / ‖x‖ over the last dimension."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


class GroupedLinear(Mixer):
    """Base of the grouped mixers; `in_group` and `sum_scale` say what a subclass adds."""

    summed = True

    def row_spec(self) -> RowSpec:
        return RowSpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            lead=max(0, self.mixer.taps - 1),
            group=self.mixer.group,
            shift=self.mixer.shift,
            sums=self.summed,
        )

    def in_group(self, products: torch.Tensor) -> torch.Tensor | None:
        """Weights of visible rows of a node's own group; None when it does not see its group."""
        return products.relu().square()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return unit(x)

    # ---- step form

    def weights(self, products: torch.Tensor, layout: Layout) -> torch.Tensor:
        own, earlier = layout.memo(("group", self.mixer.group), lambda: self._groups(layout))
        inside = self.in_group(products)
        if inside is None:
            inside = torch.zeros_like(products)
        elif own is not None:
            inside = inside.masked_fill(~own, 0.0)
        scale = self.sum_scale()
        if earlier is not None and scale is not None:
            inside = inside + scale * products.masked_fill(~earlier, 0.0)
        return inside

    def _groups(self, layout: Layout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows of a node's own group and rows of groups closed on its path, [R, 1, 1, N, C] each."""
        node = (layout.offsets // self.mixer.group)[:, :, None]
        row = (layout.columns // self.mixer.group)[:, None, :]
        own = layout.visible & (row == node)
        earlier = layout.visible & (row < node)
        return (
            None if bool(own.all()) else own[:, None, None],
            earlier[:, None, None] if bool(earlier.any()) else None,
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
        keys, values = split(k, group), split(v, group)
        weights = self._inside(blocks, keys)
        o = torch.zeros_like(blocks) if weights is None else weights @ values
        scale = self.sum_scale()
        if scale is not None:
            before = exclusive_sums(keys, values, sums)
            o = o + scale * (blocks @ before.to(blocks.dtype))
        return join(o, self.repeats, time)

    def _inside(self, blocks: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        weights = self.in_group(blocks @ keys.mT)
        if weights is None:
            return None
        causal = torch.ones(2 * (self.mixer.group,), dtype=torch.bool, device=keys.device).tril()
        return weights.masked_fill(~causal.repeat(self.repeats, 1), 0.0)


def exclusive_sums(
    keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor | None
) -> torch.Tensor:
    """Sum of kᵀv over the groups before each group, float32 or wider: [B, Hkv, n, K, V]."""
    products = keys.mT @ values
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    # shifted, not subtracted: rounding would let a group see itself
    sums = F.pad(products.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return sums if start is None else sums + start[:, :, None].to(sums.dtype)
