"""Rows of a cache as 8-bit codes: what `--kv-cache-dtype int8` keeps of every token.

    rows = encode(keys)              # [..., K] floats -> [..., quantized_width(K)] int8
    decode(rows, K, torch.float32)   # what every query reads

A row is its K codes, -127..127, rounded up to whole fours with zeros, and then the four bytes of a
float32: the scale of this row. So a row is still one row, and staging, committing and copying know
nothing of it. `kernels/cpu/csrc/rows.inc.h` reads the same bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_SCALE_BYTES = 4


def quantized_width(width: int) -> int:
    """Bytes of a quantized row of `width` features."""
    return -(-width // 4) * 4 + _SCALE_BYTES


def encode(x: torch.Tensor) -> torch.Tensor:
    """Coded rows [..., quantized_width(K)] of x [..., K]: symmetric, one scale a row."""
    codes, scales = whole(x)
    codes = F.pad(codes.to(torch.int8), (0, -x.shape[-1] % 4))
    return torch.cat((codes, scales.view(torch.int8)), dim=-1)


def whole(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -127..127 of x [..., K] as float32, and the scale [..., 1] of each row."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True)
    # the C library rounds the same quotient and product, so equal floats get equal codes; 127 / most would be
    # a product with a reciprocal
    inverse = torch.full_like(most, 127) / most
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    return (x * inverse).round(), most / 127


def decode(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The features [..., width] that quantized rows stand for."""
    scales = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :width].to(dtype) * scales.to(dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as it would be read from quantized rows; queries are rounded in the same way."""
    return decode(encode(x), x.shape[-1], x.dtype)
