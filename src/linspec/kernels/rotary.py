"""Rotary positions: the factors that turn queries and keys."""

from __future__ import annotations

import torch


def rotary_factors(
    frequencies: torch.Tensor, positions: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, ∓sin) of the angles of `positions`, positions.shape + [R] each; the angles are float32.

    frequencies: [R / 2]. The sign of the second belongs to the halves that a rotation swaps. scale: on both.
    """
    angle = positions[..., None].float() * frequencies
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
