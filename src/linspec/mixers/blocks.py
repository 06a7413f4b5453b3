"""What several mixers share: softmax weights, sequences in blocks, a banded convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def masked_softmax(scores: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension where `seen` is true (everywhere if None), float32 or wider inside."""
    wide = scores.float() if scores.dtype.itemsize < 4 else scores
    if seen is not None:
        wide = wide.masked_fill(~seen, float("-inf"))
    return wide.softmax(-1).to(scores.dtype)


def split(x: torch.Tensor, block: int) -> torch.Tensor:
    """[..., T, D] -> [..., T/block, block, D], padded with zeros at the end."""
    short = -x.shape[-2] % block
    return F.pad(x, (0, 0, 0, short)).unflatten(-2, (-1, block))


def band(taps: torch.Tensor, block: int) -> torch.Tensor:
    """Causal convolution inside a block as a matrix: taps [H, W] -> [H, block, W - 1 + block].

    Column c stands for the value c - (W - 1) tokens after the start of the block.
    """
    count = taps.shape[1]
    row = torch.arange(block, device=taps.device)[:, None]
    column = torch.arange(count - 1 + block, device=taps.device)
    distance = row + count - 1 - column
    inside = (distance >= 0) & (distance < count)
    return F.pad(taps, (0, 1))[:, torch.where(inside, distance, count)]


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


def convolve(
    v: torch.Tensor,
    taps: torch.Tensor,
    repeats: int,
    conv_history: torch.Tensor | None,
    block: int = 64,
) -> torch.Tensor:
    """Causal depthwise convolution, one kernel per query head: [B, Hkv, T, V] -> [B, H, T, V].

    You et al. 2024 (arXiv 2406.07368), section 4.1: the taps on future tokens do not exist at all,
    so nothing can train them back in.
    """
    kernel = band(taps, block).unflatten(0, (-1, repeats)).flatten(1, 2)  # [Hkv, rep * block, .]
    o = kernel[:, None].to(v.dtype) @ windows(v, conv_history, taps.shape[1] - 1, block)
    return join(o, repeats, v.shape[2])


def convolve_both(v: torch.Tensor, taps: torch.Tensor, repeats: int) -> torch.Tensor:
    """Centred depthwise convolution, for encoders: taps [H, 2W - 1], the middle one on the token itself.

    The causal convolution of the values W - 1 tokens further on.
    """
    ahead = taps.shape[1] // 2
    shifted = F.pad(v, (0, 0, 0, ahead))
    return convolve(shifted, taps, repeats, None)[:, :, ahead:]


def join(o: torch.Tensor, repeats: int, time: int) -> torch.Tensor:
    """[B, Hkv, n, rep * block, V] -> [B, H, T, V], padding dropped."""
    o = o.unflatten(3, (repeats, -1)).transpose(2, 3)  # [B, Hkv, rep, n, block, V]
    return o.flatten(3, 4).flatten(1, 2)[:, :, :time]


def tap_distances(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    visible: torch.Tensor,
    taps: int,
    conv_history: int,
) -> torch.Tensor:
    """How many tokens back each value row lies from each node: [R, N, conv_history + C]; `taps` if unseen.

    offsets [R, N], columns [R, C], visible [R, N, C]: see TreeMask. A node's window is itself and its
    nearest ancestors; past the root it reads committed rows.
    """
    before = torch.arange(-conv_history, 0, device=columns.device).expand(len(columns), -1)
    columns = torch.cat((before, columns), dim=1)
    visible = F.pad(visible, (conv_history, 0), value=True)
    distance = offsets[:, :, None] - columns[:, None, :]
    return torch.where(visible & (distance >= 0), distance, taps).clamp(max=taps)
