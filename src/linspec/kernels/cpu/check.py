"""The self-test of the compiled kernels: small exact products on this very processor."""

from __future__ import annotations

import ctypes

import torch

from linspec.kernels.cpu import library as native
from linspec.kernels.cpu import pack

INPUTS, OUTPUTS, ROWS = 96, 40, 9


def passes(library: ctypes.CDLL) -> bool:
    """Whether every kind of weights gives the product of small whole numbers exactly."""
    numbers = torch.arange(OUTPUTS * INPUTS) * 7919
    small = (numbers % 15 - 7).view(OUTPUTS, INPUTS)
    # 127 in every row: the activations' scale is then exactly 1
    x = (torch.arange(ROWS * INPUTS) * 104729 % 255 - 127).view(ROWS, INPUTS)
    x[:, 0] = 127
    expected = (x @ small.T).float()
    return all(
        bool(
            (
                native.linear(library, pack.struct(kind, *parts), x.float(), 1)[:, :OUTPUTS]
                == expected
            ).all()
        )
        for kind, parts in _packings(small)
    )


def _packings(weight: torch.Tensor) -> list[tuple[int, tuple[torch.Tensor, torch.Tensor | None]]]:
    ones = torch.ones(len(weight))
    groups = torch.ones(len(weight), INPUTS // pack.GROUP, dtype=torch.bfloat16)
    return [
        (native.F32, (pack.pack_floats(weight.float()), None)),
        (native.BF16, (pack.pack_floats(weight.to(torch.bfloat16)), None)),
        (native.INT8, pack.pack_int8(weight.to(torch.int8), ones)),
        (native.INT4, (pack.pack_int4(weight.to(torch.int8), groups), None)),
    ]
