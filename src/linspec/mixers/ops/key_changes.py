"""Keys as the changes from one token to the next that are large enough (DeltaLLM), and what that saves.

The first key of each group is kept whole. Of each later one the components are kept that differ from the key
*as rebuilt so far* by more than a threshold, as their new values: so errors do not add up, and what is kept
is exact. Every component of a rebuilt key is within the threshold of the true one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.mixers.ops.blocks import split


def moved(last: torch.Tensor, key: torch.Tensor, threshold: float) -> torch.Tensor:
    """The rebuilt key behind the rebuilt key `last`, both [..., K]."""
    return torch.where((key - last).abs() > threshold, key, last)


def rebuilt(keys: torch.Tensor, threshold: float, group: int) -> torch.Tensor:
    """Keys [..., T, K] of positions from 0 on, as they are rebuilt from their changes."""
    blocks = split(keys, group)
    found = [blocks[..., 0, :]]
    for place in range(1, group):
        found.append(moved(found[-1], blocks[..., place, :], threshold))
    return torch.stack(found, dim=-2).flatten(-3, -2)[..., : keys.shape[-2], :]


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys [..., T, K] as they are kept: which components are kept, a bit each, and their values.

    bits: bytes with the bits of the components in their order, the first one lowest.
    """

    shape: tuple[int, ...]
    bits: torch.Tensor
    values: torch.Tensor

    @property
    def kept(self) -> torch.Tensor:
        """[..., T, K] where a component is kept."""
        bits = (self.bits[:, None] >> torch.arange(8, device=self.bits.device)) & 1
        found = bits.flatten()[: torch.Size(self.shape).numel()]
        return found.bool().view(self.shape)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.values.nbytes

    def rebuilt(self) -> torch.Tensor:
        """The keys [..., T, K]."""
        kept = self.kept
        keys = self.values.new_zeros(self.shape).masked_scatter(kept, self.values)
        # each component is the last one kept at or before its token
        tokens = torch.arange(self.shape[-2], device=keys.device)[:, None].expand(self.shape)
        return keys.gather(-2, tokens.masked_fill(~kept, 0).cummax(-2).values)


def encoded(keys: torch.Tensor, threshold: float, group: int) -> Changes:
    """Keys [..., T, K] of positions from 0 on, as they are kept."""
    near = rebuilt(keys, threshold, group)
    before = torch.cat((near[..., :1, :], near[..., :-1, :]), dim=-2)
    first = torch.arange(keys.shape[-2], device=keys.device) % group == 0
    kept = ((keys - before).abs() > threshold) | first[:, None]
    bits = split(kept.flatten()[:, None], 8)[..., 0].int() << torch.arange(8, device=keys.device)
    return Changes(tuple(keys.shape), bits.sum(-1).to(torch.uint8), keys[kept])


def products_saved(kept: torch.Tensor, group: int, span: int) -> float:
    """Share of the multiply-adds of all causal scores that need not be done, with `kept` [..., T, K].

    A query reads each key before the last `span` groups through its kept components alone, since the score of
    a token is that of the token before it and what has changed.
    """
    *_, time, width = kept.shape
    whole, needed = 0.0, 0.0
    of_token = kept.flatten(0, -3).sum(-1).double().mean(0)  # [T], mean over heads
    before = torch.cat((of_token.new_zeros(1), of_token.cumsum(0))).tolist()
    for position in range(time):
        end = max(0, position // group - (span - 1)) * group
        whole += (position + 1) * width
        needed += before[end] + (position + 1 - end) * width
    return 1 - needed / whole
