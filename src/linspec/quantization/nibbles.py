"""Rows of a cache as 4-bit codes: what `--kv-cache-dtype int4` keeps of every token.

    rows = encode(keys)              # [..., K] floats -> [..., row_bytes(K)] uint8
    decode(rows, K, torch.float32)   # what every query reads

A row is a run of blocks, one for every 32 features: two float16, the step and the least feature, and then
16 bytes with the codes 0..15, those of the second half above those of the first. A feature is step · code +
least. It lies in memory as Q4_1 of a GGUF file does, and like an 8-bit row it is still one row.
`kernels/cpu/csrc/nibbles.inc.h` makes and reads the same bytes.
"""

from __future__ import annotations

import torch

FEATURES = 32
BLOCK_BYTES = 4 + FEATURES // 2
_MOST = 15


def row_bytes(width: int) -> int:
    """Bytes of a row of `width` features."""
    return -(-width // FEATURES) * BLOCK_BYTES


def encode(x: torch.Tensor) -> torch.Tensor:
    """Rows [..., row_bytes(K)] of x [..., K], each block between its least and its greatest feature.

    A block whose step or least feature float16 cannot hold, or that has what is no number, becomes NaN.
    """
    # the last feature again, which widens no block
    short = -x.shape[-1] % FEATURES
    blocks = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], short)), -1).float()
    blocks = blocks.unflatten(-1, (-1, FEATURES))
    # the C library computes the same numbers: equal floats get equal codes
    least = blocks.amin(-1, keepdim=True).half()
    step = ((blocks.amax(-1, keepdim=True) - least.float()).clamp_min(0) / _MOST).half()
    held = step.isfinite() & least.isfinite()
    step, least = (torch.where(held, each, torch.nan) for each in (step, least))
    inverse = 1 / step.float()
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    codes = ((blocks - least.float()) * inverse).round().nan_to_num(0).clamp(0, _MOST)
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return torch.cat(
        (step.view(torch.uint8), least.view(torch.uint8), low | high << 4), -1
    ).flatten(-2)


def decode(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The features [..., width] that rows stand for."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    step, least = blocks[..., :4].contiguous().view(torch.float16).float().chunk(2, -1)
    packed = blocks[..., 4:]
    codes = torch.cat((packed & _MOST, packed >> 4), -1)
    return (codes * step + least).flatten(-2)[..., :width].to(dtype)
