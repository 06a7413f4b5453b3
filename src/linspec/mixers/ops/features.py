"""Maps of queries and keys that several mixers use."""

from __future__ import annotations

import torch

# ‖x‖ below this is treated as this: padding is all zero and must stay zero
NORM_FLOOR = 1e-6


def same(x: torch.Tensor) -> torch.Tensor:
    """x, where nothing is to be mapped."""
    return x


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / ‖x‖ over the last dimension."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def two_sided_softmax(x: torch.Tensor) -> torch.Tensor:
    """[softmax(x), softmax(-x)] over the last dimension, float32 or wider inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat((wide.softmax(-1), (-wide).softmax(-1)), dim=-1).to(x.dtype)
