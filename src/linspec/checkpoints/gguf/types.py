"""The number formats of GGUF tensors: how many bytes they take, and their values as floats.

The values are exactly those of the file. `quantization/blocks.py` has the formats that need not become
floats, as the kernels multiply them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from linspec.errors import CheckpointError
from linspec.utils.messages import shown


@dataclass(frozen=True, slots=True)
class TensorType:
    """`block` values lie together in `bytes` bytes."""

    name: str
    block: int
    bytes: int


# id in the file -> format; every one that the package gguf can dequantize
TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# ids from here on are those of ik_llama.cpp, a relative of llama.cpp
_OTHER_PROJECT = 97


def type_of(number: int, tensor: str, path: Path) -> TensorType:
    """The format with this id; raises CheckpointError for one that cannot be read."""
    if number in TYPES:
        return TYPES[number]
    known = ", ".join(each.name for each in TYPES.values())
    whose = " (ik_llama.cpp has types of its own there)" if number >= _OTHER_PROJECT else ""
    raise CheckpointError(
        f"{path}: tensor {shown(tensor)} is of type {number}{whose}, which linspec cannot read; "
        f"known: {known}. Convert the file to one of these with llama-quantize"
    )


def floats(raw: np.ndarray, kind: TensorType, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of a tensor's bytes, in the floats of the file or, of blocks, in float32."""
    if kind.name in FLOATS:
        return torch.from_numpy(raw).view(FLOATS[kind.name]).reshape(shape)
    # a quarter of a second that files of floats need not wait for
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    number = next(number for number, each in TYPES.items() if each is kind)
    rows = raw.reshape(-1, shape[-1] // kind.block * kind.bytes)
    # scales may be NaN or too large: who asked for the tensor checks that it is finite
    with np.errstate(all="ignore"):
        values = dequantize(rows, GGMLQuantizationType(number))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(shape)
