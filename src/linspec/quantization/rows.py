"""Rows of a cache as 8-bit codes: what `--kv-cache-dtype int8` keeps of every token.

    rows = encode(keys)              # [..., K] floats -> [..., quantized_width(K)] int8
    decode(rows, K, torch.float32)   # what every query meets

A row is its K codes, -127..127, rounded up to whole fours with zeros, and then the four bytes of a
float32: the scale of this row. So a row is still one row, and staging, committing and copying know
nothing of it. `kernels/cpu/csrc/quantized.inc.h` reads the same bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

KINDS = ("float", "int8")
# as users say it; 'float' is the name of older versions
NAMES = ("auto", "float32", "int8")
_SCALE_BYTES = 4


def kv_of(name: str, old: str | None = None) -> str:
    """The kind that a `kv_cache_dtype` stands for, or an `old` setting that was given instead."""
    if old is not None and name not in ("auto", old):
        raise ConfigError(
            f"kv_cache_dtype is {shown(repr(name))} and kv, its old name, is {shown(repr(old))}; leave "
            "out kv"
        )
    name = name if old is None else old
    if isinstance(name, str) and name in ("float", *NAMES):
        return "int8" if name == "int8" else "float"
    raise ConfigError(
        f"kv_cache_dtype must be one of {', '.join(NAMES)}, got {shown(repr(name))}"
        f"{did_you_mean(name, NAMES)}"
    )


def check_held(name: str, dtype: torch.dtype) -> None:
    """Raise ConfigError where a cache of floats was named and the model computes in others."""
    if name == "float32" and dtype != torch.float32:
        raise ConfigError(
            f"this model computes in {dtype}, and so are its caches kept: use kv_cache_dtype='auto' or "
            "'int8', or dtype='float32'"
        )


def check_kv(kind: str) -> None:
    """Raises ConfigError unless `kind` names a way to keep the rows of a cache."""
    if kind not in KINDS:
        raise ConfigError(
            f"a cache can be kept as {' or '.join(KINDS)}, got {shown(repr(kind))}"
            f"{did_you_mean(kind, KINDS)}"
        )


def quantized_width(width: int) -> int:
    """Bytes of a quantized row of `width` features."""
    return -(-width // 4) * 4 + _SCALE_BYTES


def encode(x: torch.Tensor) -> torch.Tensor:
    """Coded rows [..., quantized_width(K)] of x [..., K]: symmetric, one scale a row."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True)
    # the C library rounds the same product: equal floats get equal codes
    inverse = 127 / most
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    codes = F.pad((x * inverse).round().to(torch.int8), (0, -x.shape[-1] % 4))
    return torch.cat((codes, (most / 127).view(torch.int8)), dim=-1)


def decode(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The features [..., width] that quantized rows stand for."""
    scales = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :width].to(dtype) * scales.to(dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as it would be read from quantized rows; queries meet these rounded alike."""
    return decode(encode(x), x.shape[-1], x.dtype)
