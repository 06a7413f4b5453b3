"""Grouped linear attention: exact for the last few groups, a running sum over the groups before.

The linear mixers differ in their feature map, in how products of rows within reach become weights,
and in what is made of the sum over closed groups; everything else is here once. With group size G,
g(t) = t // G and a span of n groups, the rows within reach of t are those of the groups
g(t) - n + 1 .. g(t), and S_t sums φ(k_s) v_sᵀ over all groups before them (float32). Groups are those
of the absolute position, so a token tree may cross one or several borders: rows of a group that
closes inside the tree count as summed for the nodes behind the border, exactly as they will after the
commit.

A kernel other than the mixer's own puts it in the *grouped arrangement*: the kernel's weights within
reach, plus α times what the mixer makes of the closed groups alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import Mixer
from linspec.mixers.blocks import join, masked_softmax, split, windows
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.state.contract import LayerState, StateOptions
from linspec.state.grouped import GroupedSpec, GroupedState, add_products

# ‖x‖ below this is treated as this: padding rows are all zero and must stay zero
NORM_FLOOR = 1e-6


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / ‖x‖ over the last dimension."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


class GroupedLinear(Mixer):
    """Base of the grouped mixers: a feature map, weights within reach, a share of the sum.

    `summed`: closed groups are summed. `wide`: features are wider than keys, so rows keep keys as
    they are. `apart`: the mixer's own weights within reach are not products of the summed features.
    """

    summed = True
    wide = False
    apart = False

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.arranged = mixer.kernel != "own"
        # one map serves rows within reach and sums
        self.one_map = not (self.arranged or self.apart)
        self.raw = self.wide or not self.one_map
        if self.arranged and self.summed:
            # α = 0 at the start: with α = 1 the unnormalised sum drowns the local part (You et al.
            # 2024, fig. 6b)
            self.alpha = nn.Parameter(torch.zeros(()))

    def state_spec(self) -> GroupedSpec:
        return GroupedSpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            conv_history=max(0, self.mixer.taps - 1),
            group=self.mixer.group,
            span=self.mixer.span,
            sum_width=self.sum_width() if self.summed else 0,
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        return GroupedState(self.state_spec(), [each.fold for each in layers], slots, options)

    # ---- what a grouped mixer defines

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """φ of queries and keys alike: [..., K] -> [..., S]."""
        return unit(x)

    def sum_width(self) -> int:
        """S, how many features keys have in the sums."""
        return self.head_width

    def in_group(self, products: torch.Tensor) -> torch.Tensor | None:
        """Own weights of rows within reach from products of features; None if they are not seen."""
        return products.relu().square()

    def sum_scale(self) -> torch.Tensor | float:
        """Factor on what closed groups give."""
        return self.alpha if self.arranged else 1.0

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        """Last touch on weighted sums of row values [..., V'] -> [..., V], such as a denominator."""
        return o

    # ---- what follows from it

    def _grouped_plan(self, alpha: float) -> AttentionPlan | None:
        """Squared or softmax weights of exact rows, unit features in the sums; None for others."""
        mixer = self.mixer
        if mixer.kernel not in ("own", "softmax") or self.relative is not None:
            return None
        return AttentionPlan(0, mixer.group, mixer.span, mixer.kernel == "own", alpha)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.raw else self.feature_map(x)

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sums [Hkv, S, Z] after entries of keys [Hkv, C, K'] and values [Hkv, C, V'] have closed."""
        return add_products(sums, self.summed_keys(keys), values)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        """What keys become when their group closes into a sum: [.., Hkv, C, K'] -> [.., Hkv, C, S]."""
        return self.feature_map(k) if self.raw else k

    def summed_queries(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become before they read the sums: [.., Hkv, rep, N, K'] -> [.., S]."""
        return self.feature_map(q) if self.raw else q

    def near_queries(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become before they meet rows within reach: [.., Hkv, rep, N, K'] -> [.., .]."""
        return self.summed_queries(q) if self.one_map else self.near_features(q)

    def near_keys(self, k: torch.Tensor) -> torch.Tensor:
        """What row keys become before the queries within their reach meet them."""
        return self.summed_keys(k) if self.one_map else self.near_features(k)

    def near_features(self, x: torch.Tensor) -> torch.Tensor:
        """What queries and keys become within reach, where those are not the summed features."""
        return unit(x) if self.mixer.kernel == "relu2" else x

    def near_weights(
        self,
        products: torch.Tensor,
        seen: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Weights of rows from products; `seen` is false at rows out of reach, None if all count.

        bias: of relative positions. It joins the scores of a softmax and the weights of other
        kernels, as in You et al. 2024.
        """
        if self.mixer.kernel == "softmax":
            scores = products * self.config.score_scale
            return masked_softmax(scores if bias is None else scores + bias, seen)
        weights = products.relu().square() if self.arranged else self.in_group(products)
        if weights is not None and bias is not None:
            weights = weights + bias
        return weights if weights is None or seen is None else weights.masked_fill(~seen, 0.0)

    def combine(self, near: torch.Tensor | None, far: torch.Tensor | None) -> torch.Tensor:
        """Outputs [..., V] from the value sums [..., V'] within reach and over closed groups.

        None where there is no such part; one of them is there.
        """
        if near is None or far is None:
            both = self.sum_scale() * far if far is not None else near
        elif self.arranged:
            return near[..., : self.head_width] + self.sum_scale() * self.finish(far)
        else:
            both = near + self.sum_scale() * far
        assert both is not None
        return self.finish(both)

    # ---- step form

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        near, beyond = self.groups(tree_mask)
        bias = None if self.relative is None else self.step_bias(self.relative, tree_mask)
        o = self._near_rows(q, keys, values, near, bias)
        far = None if sums is None else self._far_rows(q, keys, values, tree_mask, beyond, sums)
        return self.combine(o, far).unflatten(2, q.shape[2:4])

    def _near_rows(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """What nodes read from the rows within reach, [R, Hkv, rep * N, V']."""
        nodes = self.near_queries(q).flatten(2, 3)
        products = (nodes @ self.near_keys(keys).mT).unflatten(2, q.shape[2:4])
        weights = self.near_weights(products, seen, bias)
        return None if weights is None else weights.flatten(2, 3) @ values

    def _far_rows(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        beyond: torch.Tensor | None,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        """What nodes read from the sums and from rows of groups closed on their path."""
        flat = self.summed_queries(q).flatten(2, 3)
        o = (flat.to(sums.dtype) @ sums).to(values.dtype)
        if beyond is not None:
            products = (flat @ self.summed_keys(keys).mT).unflatten(2, q.shape[2:4])
            o = o + products.masked_fill(~beyond, 0.0).flatten(2, 3) @ values
        return o

    def groups(self, tree_mask: TreeMask) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As `_groups`, once per tree_mask."""
        key = ("group", self.mixer.group, self.mixer.span)
        found: tuple[torch.Tensor | None, torch.Tensor | None] = tree_mask.memo(
            key, lambda: self._groups(tree_mask)
        )
        return found

    def _groups(self, tree_mask: TreeMask) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows within a node's reach and rows of groups closed on its path, [R, 1, 1, N, C] each.

        None instead of a mask that is all true or all false.
        """
        if tree_mask.deepest // self.mixer.group < self.mixer.span:
            return None if tree_mask.plain else tree_mask.visible[:, None, None], None
        oldest = (tree_mask.offsets // self.mixer.group)[:, :, None] - (self.mixer.span - 1)
        row = (tree_mask.columns // self.mixer.group)[:, None, :]
        near = tree_mask.visible & (row >= oldest)
        beyond = tree_mask.visible & (row < oldest)
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
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        blocks, near_k = self._blocks(self.near_queries(heads)), self.near_keys(k)
        far = None
        if self.one_map and self.summed:
            far = self._read_closed(blocks, near_k, v, sums)
        elif self.summed:
            far = self._far_blocks(heads, k, v, sums)
        near = self._near_blocks(blocks, near_k, v)
        return join(self.combine(near, far), self.repeats, q.shape[2])

    def _far_blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """What queries [B, Hkv, rep, T, K'] read from the groups beyond reach: [B, Hkv, n, rep * G, V'].

        start: as in `_closed_sums`. For mixers whose summed features are a map of their own.
        """
        return self._read_closed(
            self._blocks(self.summed_queries(q)), self.summed_keys(k), v, start
        )

    def _read_closed(
        self, blocks: torch.Tensor, keys: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """As `_far_blocks`, from summed features: blocks [B, Hkv, n, rep * G, S], keys [B, Hkv, T, S]."""
        closed = self._closed_sums(self._split(keys), self._split(v), start)
        return blocks @ closed.to(blocks.dtype)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return split(x, self.mixer.group)

    def _blocks(self, q: torch.Tensor) -> torch.Tensor:
        """Queries of the heads that share a key: [B, Hkv, rep, T, K] -> [B, Hkv, n, rep * G, K]."""
        return self._split(q).transpose(2, 3).flatten(3, 4)

    def _near_blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor | None:
        """What the queries of each block [B, Hkv, n, rep * G, K] read within reach: [.., V']."""
        group = self.mixer.group
        # before the first block there is nothing
        before = (min(self.mixer.span, q.shape[2]) - 1) * group
        keys = windows(k, None, before, group)
        seen = causal_window(keys.shape[2], group, before, k.device)
        bias = self._block_bias(keys.shape[3], before)
        weights = self.near_weights(q @ keys.mT, seen.repeat(1, self.repeats, 1), bias)
        return None if weights is None else weights @ windows(v, None, before, group)

    def _block_bias(self, columns: int, before: int) -> torch.Tensor | None:
        """The relative bias between the rows of a block and what lies around it: [Hkv, 1, rep * G, C]."""
        if self.relative is None:
            return None
        device = self.relative.table.weight.device
        column = torch.arange(columns, device=device) - before
        row = torch.arange(self.mixer.group, device=device)[:, None]
        bias: torch.Tensor = self.relative(self.relative.buckets(row - column))
        return bias.unflatten(0, (self.kv_heads, self.repeats)).flatten(1, 2)[:, None]

    def _closed_sums(
        self, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum of φ(k) vᵀ over the groups beyond the reach of each group: [B, Hkv, n, S, V'].

        float32 or wider; start [B, Hkv, S, V'] are the groups closed before the sequence.
        """
        sums = self._shifted_sums(group_sums(keys, values))
        return sums if start is None else sums + start[:, :, None].to(sums.dtype)

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
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        if real is None:
            real = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
        near = self._near_both(self._blocks(self.near_queries(heads)), self.near_keys(k), v, real)
        far = None
        if self.summed:
            far = self._distant_blocks(heads, k, v, alone=near is None)
        return join(self.combine(near, far), self.repeats, q.shape[2])

    def _near_both(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor | None:
        """As `_near_blocks`, with as many groups behind a block as ahead of it."""
        group = self.mixer.group
        reach = (self.mixer.span - 1) * group
        keys = windows(k, None, reach, group, reach)
        seen = windows(real[:, None, :, None].byte(), None, reach, group, reach).mT.bool()
        # a group of padding sees padding: a softmax over nothing is NaN, also in its gradient
        seen = seen | ~seen.any(-1, keepdim=True)
        weights = self.near_weights(q @ keys.mT, seen, self._block_bias(keys.shape[3], reach))
        return None if weights is None else weights @ windows(v, None, reach, group, reach)

    def _distant_blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, alone: bool
    ) -> torch.Tensor:
        """As `_far_blocks`, from groups to both sides; alone: see `_distant_sums`."""
        products = group_sums(self._split(self.summed_keys(k)), self._split(v))
        queries = self._blocks(self.summed_queries(q))
        return queries @ self._distant_sums(products, alone=alone).to(queries.dtype)

    def _distant_sums(self, products: torch.Tensor, *, alone: bool) -> torch.Tensor:
        """Sums over all groups that a group does not see exactly: [B, Hkv, n, S, V'].

        alone: there is no exact part, so a group's sum has the group itself too, as in FLASH.
        """
        if alone:
            return products.sum(2, keepdim=True)
        earlier = self._shifted_sums(products)
        return earlier + self._shifted_sums(products.flip(2)).flip(2)


def group_sums(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """φ(k) vᵀ of every group, float32 or wider: [B, Hkv, n, S, V']."""
    products = keys.mT @ values
    return products.to(torch.promote_types(products.dtype, torch.float32))


def causal_window(count: int, group: int, before: int, device: torch.device) -> torch.Tensor:
    """Rows of its block, and of the `before` ones ahead, that each token sees: [n, G, before + G]."""
    row = torch.arange(group, device=device)[:, None]
    column = torch.arange(before + group, device=device) - before
    first = torch.arange(count, device=device)[:, None, None] * group
    return (column <= row) & (column >= -first)
