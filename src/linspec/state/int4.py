"""Caches of 4-bit codes: about 5 bits a feature, see `quantization/nibbles.py`."""

from __future__ import annotations

import torch

from linspec.quantization.nibbles import decode, encode, row_bytes
from linspec.quantization.rows import rounded
from linspec.state.entries import EntryFormat
from linspec.state.kv_cache import KVCache
from linspec.state.registry import STATES


class Int4Entries:
    """Blocks of the codes of each key and value, ahead of which are their step and least feature."""

    name = "int4"
    in_kernels = True

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def width(self, width: int) -> int:
        return row_bytes(width)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return encode(x)

    def decode(self, kept: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return decode(kept, width, dtype)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        # 8 bits, as they meet 8-bit keys
        return rounded(q)


@STATES.register(
    "int4",
    summary="4-bit codes with a step and a least feature for every 32 features of a key or value",
    paper="Sheng et al. 2023 (FlexGen), arXiv 2303.06865",
)
class Int4Cache(KVCache):
    """A cache that grows, of 4-bit codes."""

    entries: EntryFormat = Int4Entries()
