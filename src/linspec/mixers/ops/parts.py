"""The two parts of a linear mixer side by side: exact within the span, summed before it.

Each form gives the value sums of both; None stands for a part that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from linspec.decoding.tree_mask import TreeMask
from linspec.mixers.ops.decayed import Decayed
from linspec.mixers.ops.exact import Exact, Groups, Map, plain_weights
from linspec.mixers.ops.summed import Summed, to_blocks

Pair = tuple[torch.Tensor | None, torch.Tensor | None]


def weigh_features(summed: Summed | Decayed | None, of: Map) -> Exact:
    """Exact weights `of` products of the features that are summed too."""
    assert not isinstance(summed, Decayed), "what fades has no exact weights of its own"
    part = partial(plain_weights, of=of)
    return Exact(part) if summed is None else Exact(part, summed.queries, summed.keys)


@dataclass(frozen=True)
class Parts:
    """An exact and a summed part over the same groups; a bias goes to the exact part."""

    groups: Groups
    exact: Exact | None
    summed: Summed | Decayed | None

    def nodes(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> Pair:
        """What the nodes of a step read: [R, Hkv, rep * N, V'] each."""
        seen, closed = self.groups.masks(tree_mask)
        exact = summed = None
        if self.exact is not None:
            exact = self.exact.nodes(q, keys, values, seen, bias)
        if sums is not None and self.summed is not None:
            summed = self.summed.nodes(q, keys, values, tree_mask, closed, sums)
        return exact, summed

    def blocks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> Pair:
        """What the blocks of a sequence read: q [B, Hkv, rep, T, K'] -> [B, Hkv, n, rep * G, V'] each."""
        exact = summed = None
        if self.exact is not None:
            blocks, keys = to_blocks(self.exact.queries(q), self.groups.size), self.exact.keys(k)
            exact = self.exact.blocks(blocks, keys, v, self.groups, bias)
            if isinstance(self.summed, Summed) and self.summed.queries == self.exact.queries:
                # one map serves both parts
                summed = self.summed.read_blocks(blocks, keys, v, sums)
        if summed is None and self.summed is not None:
            summed = self.summed.blocks(q, k, v, sums)
        return exact, summed

    def blocks_both(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        real: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> Pair:
        """As `blocks` for encoders, whose blocks see both sides."""
        exact = summed = None
        if self.exact is not None:
            if real is None:
                real = torch.ones(len(q), q.shape[3], dtype=torch.bool, device=q.device)
            blocks, keys = to_blocks(self.exact.queries(q), self.groups.size), self.exact.keys(k)
            exact = self.exact.blocks_both(blocks, keys, v, real, self.groups, bias)
        if isinstance(self.summed, Summed):
            summed = self.summed.blocks_both(q, k, v, alone=exact is None)
        return exact, summed
