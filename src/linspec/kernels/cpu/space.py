"""Scratch memory for calls into C, kept from one call to the next."""

from __future__ import annotations

import torch

_ALIGNMENT = 64


class Space:
    """Memory that grows when a call needs more; what it held is then lost."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def at_least(self, size: int) -> int:
        """Address of `size` aligned bytes, valid until the next call."""
        if len(self._bytes) < size + _ALIGNMENT:
            self._bytes = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        return -(-self._bytes.data_ptr() // _ALIGNMENT) * _ALIGNMENT
