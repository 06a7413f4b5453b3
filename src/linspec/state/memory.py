"""Memory of states: tensors that take it only when they are written, and whether there is enough."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Sequence
from functools import cache

import torch

from linspec.errors import StateError
from linspec.kernels.device import free_bytes


def zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A zero tensor backed by anonymous mmap, so unused slots take no physical memory until written."""
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or not count:
        return torch.zeros(*shape, dtype=dtype, device=device)
    # private where the choice exists: a forked child must not write into its parent's state
    options = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    try:
        pages = mmap.mmap(-1, count * dtype.itemsize, **options)
    except (OSError, OverflowError, ValueError) as error:
        raise StateError(
            f"the system has no address space for {count * dtype.itemsize / 2**30:.1f} GiB of state; "
            "lower max_batch, the context or the span"
        ) from error
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


# bytes below which zeros are written: to ask the system takes its time
_ASKED = 1 << 16
_DONTNEED = 4


def clear(parts: torch.Tensor) -> None:
    """Zero parts [N, ..] of what `zeros` made, each contiguous, and give their memory back to the system."""
    # elsewhere pages that are given back do not become zeros
    asked = parts.device.type == "cpu" and sys.platform == "linux"
    if not asked or parts[0].nbytes < _ASKED:
        parts.zero_()
        return
    for part in parts:
        _give_back(part.view(-1))


def _give_back(flat: torch.Tensor) -> None:
    """Zero a contiguous part: whole pages of the system by giving them back."""
    size, first, last = flat.element_size(), flat.data_ptr(), flat.data_ptr() + flat.nbytes
    begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if _library().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED):
        flat.zero_()
        return
    flat[: (begin - first) // size].zero_()
    flat[(end - first) // size :].zero_()


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def check_new_state(
    needed: int, positions: int, layers: int, slots: int, device: torch.device
) -> None:
    """Raise StateError unless the `needed` bytes of a new state fit into memory."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise StateError(
            f"the state of one sequence, {positions} positions in each of {layers} layers, and the sums "
            f"of {slots} need {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; "
            "lower max_batch or the budget of its attention, or take a model of smaller group, span or window"
        )


def check_growth(missing: int, tokens: int, device: torch.device | str) -> None:
    """Raise StateError unless caches can grow by `missing` bytes to `tokens` tokens."""
    free = free_bytes(device) if missing else None
    if free is not None and missing > free:
        raise StateError(
            f"the keys and values of {tokens} tokens need {missing / 2**30:.1f} GiB more memory and "
            f"{free / 2**30:.1f} GiB are free; shorten the prompt, lower max_batch, or linearize the "
            "model: the state of linear mixers does not grow"
        )
