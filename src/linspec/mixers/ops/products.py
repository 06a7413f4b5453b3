"""Products of queries and keys that fade with the distance between their tokens."""

from __future__ import annotations

import torch


def decayed_products(
    q: torch.Tensor,
    k: torch.Tensor,
    at: torch.Tensor,
    decay: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Products of q [..., rep, N, K] and k [..., C, K] that fade along the path: [..., rep, N, C].

    at [..., N, .] and decay [..., C, .] are A of the queries' and the keys' tokens, per channel or for
    all; products are 0 where `seen` [..., N, C] is false.
    """
    # differences of logarithms, masked before exp: off the path they may be large
    if decay.shape[-1] == 1:
        left = (at - decay.mT).masked_fill(~seen, float("-inf")).exp()
        products = (q.flatten(-3, -2) @ k.mT).unflatten(-2, q.shape[-3:-1])
        return products * left.unsqueeze(-3)
    gaps = at.unsqueeze(-2) - decay.unsqueeze(-3)  # [..., N, C, K]
    left = gaps.masked_fill(~seen.unsqueeze(-1), float("-inf")).exp()
    return (q.transpose(-3, -2) @ (left * k.unsqueeze(-3)).mT).transpose(-3, -2)
