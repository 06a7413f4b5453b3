"""Which tokens are kept for the draw: scores [V] in, scores with -inf for the others out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Scores [V] with -inf below the k-th largest; ties with it stay. 0 keeps all."""
    if k == 0 or k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Scores [V] with -inf outside the fewest tokens whose mass reaches p (at least one stays)."""
    if p == 1:
        return scores
    rising, order = scores.sort(stable=True)
    dropped = rising.softmax(-1).cumsum(-1) <= 1 - p
    dropped[-1] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -math.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Scores [V] with -inf below p times the likeliest token's probability (Nguyen et al. 2024)."""
    if p == 0:
        return scores
    return scores.masked_fill(scores < scores.max() + math.log(p), -math.inf)
