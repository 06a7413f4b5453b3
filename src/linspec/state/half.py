"""Caches of 16-bit floats under a model that computes in wider numbers: half the memory of float32."""

from __future__ import annotations

import torch

from linspec.state.entries import EntryFormat
from linspec.state.kv_cache import KVCache
from linspec.state.registry import STATES


class HalfEntries:
    """Keys and values rounded to the nearest number of `dtype`."""

    in_kernels = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype

    def width(self, width: int) -> int:
        return width

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)

    def decode(self, kept: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return kept.to(dtype)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return q


@STATES.register(
    "bfloat16",
    summary="keys and values rounded to bfloat16: 8 significant bits",
    paper="Kalamkar et al. 2019, arXiv 1905.12322",
)
class BFloat16Cache(KVCache):
    """A cache that grows, of bfloat16 entries."""

    entries: EntryFormat = HalfEntries(torch.bfloat16)


@STATES.register(
    "float16",
    summary="keys and values rounded to float16: 11 significant bits, up to 65504",
    paper="Micikevicius et al. 2017, arXiv 1710.03740",
)
class Float16Cache(KVCache):
    """A cache that grows, of float16 entries."""

    entries: EntryFormat = HalfEntries(torch.float16)
