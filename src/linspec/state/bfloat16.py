"""Caches of bfloat16 entries under a model that computes in wider numbers: half the memory of float32."""

from __future__ import annotations

import torch

from linspec.state.entries import EntryFormat
from linspec.state.kv_cache import KVCache
from linspec.state.registry import STATES


class BFloat16Entries:
    """Keys and values rounded to 8 significant bits; the range is that of float32."""

    name = "bfloat16"
    in_kernels = False

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def width(self, width: int) -> int:
        return width

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()

    def decode(self, kept: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return kept.to(dtype)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return q


@STATES.register(
    "bfloat16",
    summary="keys and values rounded to bfloat16; steps run layer by layer",
    paper="Kalamkar et al. 2019, arXiv 1905.12322",
)
class BFloat16Cache(KVCache):
    """A cache that grows, of bfloat16 entries."""

    entries: EntryFormat = BFloat16Entries()
