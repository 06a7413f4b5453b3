"""Two thread pools on the same cores: torch's, and that of linspec's own kernels.

torch's OpenMP threads spin after every parallel operator for longer than a step of a small model
takes, on the cores that the next native call needs. Between native calls, torch's operators are small:
there they run on the calling thread and wake nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_native: int | None = None


def native_threads() -> int:
    """Threads of a native call: as many as torch was told to use."""
    return torch.get_num_threads() if _native is None else _native


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread and native calls on as many as before."""
    global _native
    before, kept = _native, torch.get_num_threads()
    _native = native_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)
        _native = before
