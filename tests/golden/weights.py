"""Numbers that are the same on every machine, in every version of numpy and torch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

Shape = Sequence[int]


def uniform(name: str, shape: Shape) -> np.ndarray:
    """Float64 from [-1, 1), decided by `name`; only PCG64's raw stream is promised to stay."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return (np.asarray(raw >> np.uint64(40), np.float64) / 2**23 - 1).reshape(shape)


def weights(shapes: dict[str, Shape], seed: str, noise: str = "") -> dict[str, np.ndarray]:
    """A float32 tensor for each name of `shapes`: matrices that keep the size of what they multiply.

    Vectors and scalars are positive: zeros would hide mistakes. noise: names a perturbation on top.
    """
    return {name: _tensor(f"{seed}/{name}", shape, noise) for name, shape in shapes.items()}


def _tensor(name: str, shape: Shape, noise: str) -> np.ndarray:
    if len(shape) < 2:
        return np.asarray(0.9 + 0.4 * uniform(name, shape), np.float32)
    drawn = uniform(name, shape) * math.sqrt(3)
    if noise:
        drawn = drawn + 0.3 * uniform(f"{noise}/{name}", shape)
    return (drawn / math.sqrt(shape[-1])).astype(np.float32)


def tokens(name: str, count: int, vocab: int) -> list[int]:
    """Token ids that repeat themselves in part, so that there is something to look up."""
    drawn = [int(t) for t in np.floor((uniform(name, (count,)) + 1) / 2 * (vocab - 3)) + 3]
    half = count // 2
    return [*drawn[:half], *drawn[: count - half]]
