"""The entries of a state: what one position keeps in one layer, its sizes and its format in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class EntrySpec:
    """Sizes of the entries of one kind of layer: a key and a value of each KV head.

    Attributes:
        kv_heads: key/value heads.
        key_width: elements of a key.
        value_width: elements of a value.
        conv_history: values that are kept before the base position, for a convolution.
    """

    kv_heads: int
    key_width: int
    value_width: int
    conv_history: int = 0


class EntryFormat(Protocol):
    """How entries lie in memory; one more is one file, such as `int8.py`.

    in_kernels: whether compiled kernels read it.
    """

    name: str
    in_kernels: bool

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the buffers of a model that computes in `dtype`."""
        ...

    def width(self, width: int) -> int:
        """Elements that `width` features take."""
        ...

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] as it is kept."""
        ...

    def decode(self, kept: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The features [..., width] that were kept, nearly or exactly."""
        ...

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Queries as they meet such keys."""
        ...


class FloatEntries:
    """Entries in the dtype that the model computes in."""

    name = "float"
    in_kernels = True

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def width(self, width: int) -> int:
        return width

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, kept: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return kept

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return q


FLOATS: EntryFormat = FloatEntries()
