"""Caches of 8-bit codes: a quarter of the memory of float32 entries, see `quantization/rows.py`."""

from __future__ import annotations

import torch

from linspec.quantization.rows import decode, encode, quantized_width, rounded
from linspec.state.entries import EntryFormat
from linspec.state.kv_cache import KVCache
from linspec.state.registry import STATES


class Int8Entries:
    """The codes of each key and value, and behind them their scale."""

    name = "int8"
    in_kernels = True

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def width(self, width: int) -> int:
        return quantized_width(width)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return encode(x)

    def decode(self, kept: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return decode(kept, width, dtype)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return rounded(q)


@STATES.register(
    "int8",
    summary="8-bit codes with one scale a key or value",
    paper="Sheng et al. 2023 (FlexGen), arXiv 2303.06865",
)
class Int8Cache(KVCache):
    """A cache that grows, of 8-bit codes."""

    entries: EntryFormat = Int8Entries()
