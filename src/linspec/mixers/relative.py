"""Relative position bias (Raffel et al. 2020, T5): one learned number per head and bucket of distances.

Near distances have a bucket each, far ones share buckets that widen with their logarithm.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from linspec.decoding.tree_mask import TreeMask
from linspec.mixers.config import RelativeConfig
from linspec.mixers.ops.exact import Groups


class RelativeBias(nn.Module):
    """Turns distances between tokens into what is added to their weights or scores.

    causal: keys are never later than their query, and all buckets are for the past; else half of
    them are for keys that come later.
    """

    def __init__(self, config: RelativeConfig, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.table = nn.Embedding(config.buckets, heads)

    def buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """Bucket of every distance (position of the query minus that of the key), any shape."""
        if self.causal:
            return self._one_side(distance.clamp_min(0), self.config.buckets)
        half = self.config.buckets // 2
        return self._one_side(distance.abs(), half) + half * (distance < 0)

    def _one_side(self, distance: torch.Tensor, buckets: int) -> torch.Tensor:
        exact = buckets // 2
        # float32 as in T5's own code: the borders of the wide buckets are where it rounds to
        ratio = distance.clamp_min(1).float() / exact
        widening = ratio.log() / math.log(self.config.max_distance / exact) * (buckets - exact)
        far = (exact + widening.long()).clamp_max(buckets - 1)
        return torch.where(distance < exact, distance, far)

    def forward(self, buckets: torch.Tensor) -> torch.Tensor:
        """Bias of `buckets` [..., N, C] for every head: [..., H, N, C]."""
        return self.table(buckets).movedim(-1, -3)

    def by_distance(self) -> torch.Tensor:
        """Bias of a causal stack at distances 0, 1, ... [H, D]; the last one is that of all greater ones."""
        distances = torch.arange(self.config.max_distance + 1, device=self.table.weight.device)
        return self.table(self.buckets(distances)).T.detach().float().contiguous()

    def nodes(self, tree_mask: TreeMask, kv_heads: int) -> torch.Tensor:
        """Bias between the nodes of a step and what they see: [R, Hkv, rep, N, C]."""

        def buckets() -> torch.Tensor:
            return self.buckets(tree_mask.offsets[:, :, None] - tree_mask.columns[:, None, :])

        bias: torch.Tensor = self(tree_mask.memo(("buckets", self.config), buckets))
        return bias.unflatten(1, (kv_heads, -1))

    def blocks(self, groups: Groups, time: int, kv_heads: int) -> torch.Tensor:
        """Bias between the tokens of a block and those within its span: [Hkv, 1, rep * G, C]."""
        before = groups.before(-(-time // groups.size))
        return self._around(groups.size, before, 0, kv_heads)

    def blocks_both(self, groups: Groups, kv_heads: int) -> torch.Tensor:
        """As `blocks` for encoders, with as many groups behind a block as ahead of it."""
        reach = (groups.span - 1) * groups.size
        return self._around(groups.size, reach, reach, kv_heads)

    def _around(self, group: int, before: int, after: int, kv_heads: int) -> torch.Tensor:
        device, columns = self.table.weight.device, before + group + after
        column = torch.arange(columns, device=device) - before
        row = torch.arange(group, device=device)[:, None]
        bias: torch.Tensor = self(self.buckets(row - column))
        return bias.unflatten(0, (kv_heads, -1)).flatten(1, 2)[:, None]

    def between(self, queries: int, keys: int) -> torch.Tensor:
        """Bias between `queries` and `keys` tokens that both start at position 0: [H, N, C]."""
        device = self.table.weight.device
        distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
        bias: torch.Tensor = self(self.buckets(distance))
        return bias
