"""What a slot would hold if a branch of a step had overwritten its entries, until one of them is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Branch:
    """A copy of the entries of a slot, as they are kept: keys [L, Hkv, C, K], values [L, Hkv, C', V].

    positions: those that the branch, or one before it, has overwritten.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: frozenset[int]

    def follow(self, positions: Sequence[int]) -> Branch:
        """A branch behind this one, whose entries are copied layer by layer."""
        room = torch.empty_like(self.keys), torch.empty_like(self.values)
        return Branch(*room, self.positions.union(positions))
