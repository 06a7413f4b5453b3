"""Padded batches: every row is shifted so that its first real token stands at position 0.

All mixers are causal, so padding behind the real tokens changes nothing in front of it. One shift
before the decoder, and one back behind it, is all that padding needs.
"""

from __future__ import annotations

import torch

from linspec.errors import InputError


def to_left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] with the real tokens (mask [B, T] is true) of each row first, and the shifts [B].

    Raises InputError if the shapes differ or a row's real tokens are not next to each other.
    """
    if mask.shape != ids.shape:
        raise InputError(f"mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}")
    real = mask.bool()
    starts = real.int().diff(dim=1, prepend=real.new_zeros(len(real), 1).int()) > 0
    gaps = (starts.sum(1) > 1).nonzero()
    if len(gaps):
        raise InputError(
            f"row {int(gaps[0])} has padding between its tokens; pad at the left or right end only"
        )
    shifts = starts.int().argmax(1)
    return _roll(ids, shifts), shifts


def from_left(x: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """x [B, T, ...] back in the places that the ids had before `to_left`."""
    return _roll(x, -shifts)


def _roll(x: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    time = torch.arange(x.shape[1], device=x.device)
    places = (time + shifts[:, None]) % x.shape[1]
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, places]
