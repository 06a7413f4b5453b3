"""Sequences in blocks of equal length, with what lies around each block."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def split(x: torch.Tensor, block: int) -> torch.Tensor:
    """[..., T, D] -> [..., T/block, block, D], padded with zeros at the end."""
    short = -x.shape[-2] % block
    return F.pad(x, (0, 0, 0, short)).unflatten(-2, (-1, block))


def windows(
    v: torch.Tensor, conv_history: torch.Tensor | None, before: int, block: int, after: int = 0
) -> torch.Tensor:
    """Values of every block with the `before` values ahead of it and the `after` values behind it.

    v [B, Hkv, T, V] -> [B, Hkv, T/block, before + block + after, V]; conv_history [B, Hkv, before, V]
    precedes v.
    """
    # pieces of whole blocks, not overlapping views: the compiled backward of `unfold` is wrong
    ahead, behind, count = -(-before // block), -(-after // block), -(-v.shape[2] // block)
    room = ahead * block - (0 if conv_history is None else before)
    if conv_history is not None:
        v = torch.cat((conv_history, v), dim=2)
    missing = (ahead + count + behind) * block - room - v.shape[2]
    blocks = F.pad(v, (0, 0, room, missing)).unflatten(2, (-1, block))
    pieces = [blocks[:, :, i : i + count] for i in range(ahead + 1 + behind)]
    if ahead:
        pieces[0] = pieces[0][:, :, :, ahead * block - before :]
    if behind:
        pieces[-1] = pieces[-1][:, :, :, : after - (behind - 1) * block]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3)


def shifted(x: torch.Tensor, dim: int, length: int, count: int, at: int) -> torch.Tensor:
    """The `length` entries of `x` from 0, 1, … count - 1 on along `dim`, stacked at the new axis `at`."""
    # copies, not the overlapping views of `unfold`: see `windows`
    return torch.stack([x.narrow(dim, i, length) for i in range(count)], dim=at)


def join(o: torch.Tensor, repeats: int, time: int) -> torch.Tensor:
    """[B, Hkv, n, rep * block, V] -> [B, H, T, V], padding dropped."""
    o = o.unflatten(3, (repeats, -1)).transpose(2, 3)  # [B, Hkv, rep, n, block, V]
    return o.flatten(3, 4).flatten(1, 2)[:, :, :time]


def causal_window(count: int, group: int, before: int, device: torch.device) -> torch.Tensor:
    """Rows of its block, and of the `before` ones ahead, that each token sees: [n, G, before + G]."""
    row = torch.arange(group, device=device)[:, None]
    column = torch.arange(before + group, device=device) - before
    first = torch.arange(count, device=device)[:, None, None] * group
    return (column <= row) & (column >= -first)
