"""The summed part of a mixer: what queries read from groups before the span, as one matrix per head.

    o_t = φ(q_t) S_t,    S_t = Σ φ(k_s) v_sᵀ over all groups that are closed for t

Rows of a group that closes inside a token tree count as summed for the nodes behind its border, exactly as
they will after the commit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linspec.decoding.tree_mask import TreeMask
from linspec.mixers.ops.blocks import split
from linspec.mixers.ops.exact import Groups, Map
from linspec.mixers.ops.features import same
from linspec.state.grouped import add_products


@dataclass(frozen=True)
class Summed:
    """φ of queries [.., Hkv, rep, N, K'] and of keys [.., Hkv, C, K']."""

    groups: Groups
    queries: Map = same
    keys: Map = same

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sums [Hkv, S, Z] after entries of keys [Hkv, C, K'] and values [Hkv, C, V'] have closed."""
        return add_products(sums, self.keys(keys), values)

    def summary(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Sums over closed groups: k [B, Hkv, T, K'] and v [B, Hkv, T, V'] -> [B, Hkv, S, V']."""
        return group_sums(self.keys(k), v)

    def joined(self, sums: torch.Tensor | None, summary: torch.Tensor, tokens: int) -> torch.Tensor:
        """The sums after a shard, from those before it."""
        return summary if sums is None else sums + summary

    def nodes(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        closed: torch.Tensor | None,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        """What the nodes of a step read from the sums and from groups closed on their path."""
        flat = self.queries(q).flatten(2, 3)
        o = (flat.to(sums.dtype) @ sums).to(values.dtype)
        if closed is not None:
            products = (flat @ self.keys(keys).mT).unflatten(2, q.shape[2:4])
            o = o + products.masked_fill(~closed, 0.0).flatten(2, 3) @ values
        return o

    def blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """What each block of a sequence reads from the groups before its span: [B, Hkv, n, rep * G, V'].

        q [B, Hkv, rep, T, K']; start [B, Hkv, S, V'] are the groups closed before the sequence.
        """
        blocks = to_blocks(self.queries(q), self.groups.size)
        return self.read_blocks(blocks, self.keys(k), v, start)

    def read_blocks(
        self, blocks: torch.Tensor, keys: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """As `blocks`, from features: blocks [B, Hkv, n, rep * G, S], keys [B, Hkv, T, S]."""
        group = self.groups.size
        closed = shifted_sums(group_sums(split(keys, group), split(v, group)), self.groups.span)
        if start is not None:
            closed = closed + start[:, :, None].to(closed.dtype)
        return blocks @ closed.to(blocks.dtype)

    def blocks_both(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, alone: bool
    ) -> torch.Tensor:
        """As `blocks` for encoders, from groups to both sides; alone: see `distant_sums`."""
        group = self.groups.size
        products = group_sums(split(self.keys(k), group), split(v, group))
        queries = to_blocks(self.queries(q), group)
        sums = distant_sums(products, self.groups.span, alone=alone)
        return queries @ sums.to(queries.dtype)


def to_blocks(q: torch.Tensor, group: int) -> torch.Tensor:
    """Queries of the heads that share a key: [B, Hkv, rep, T, K] -> [B, Hkv, n, rep * G, K]."""
    return split(q, group).transpose(2, 3).flatten(3, 4)


def group_sums(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """φ(k) vᵀ of every group, float32 or wider: [B, Hkv, n, S, V']."""
    products = keys.mT @ values
    return products.to(torch.promote_types(products.dtype, torch.float32))


def shifted_sums(products: torch.Tensor, span: int) -> torch.Tensor:
    """Sums over the groups `span` and more before each group."""
    # shifted, not subtracted: rounding would let a group see itself
    count = products.shape[2]
    return F.pad(products.cumsum(2), (0, 0, 0, 0, span, 0))[:, :, :count]


def distant_sums(products: torch.Tensor, span: int, *, alone: bool) -> torch.Tensor:
    """Sums over all groups that a group does not see exactly: [B, Hkv, n, S, V'].

    alone: there is no exact part, so a group's sum has the group itself too, as in FLASH.
    """
    if alone:
        return products.sum(2, keepdim=True)
    earlier = shifted_sums(products, span)
    return earlier + shifted_sums(products.flip(2), span).flip(2)
