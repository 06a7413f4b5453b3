"""The self-test of the compiled kernels: small exact products on this very processor."""

from __future__ import annotations

import ctypes

import torch

from linspec.kernels.cpu import pack
from linspec.kernels.cpu.blocks import block_rows, pack_blocks
from linspec.kernels.cpu.linear import linear, linear_struct
from linspec.kernels.step_plan import BF16, BLOCKS, F32, INT4, INT8, LinearPlan
from linspec.quantization.blocks import BLOCK_FORMATS, BlockFormat
from linspec.quantization.codes import GROUP

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
        torch.equal(linear(library, linear_struct(plan), x.float(), 1), expected)
        for plan in _plans(small)
    ) and all(_multiplies(library, kind) for kind in BLOCK_FORMATS.values())


def _multiplies(library: ctypes.CDLL, kind: BlockFormat) -> bool:
    """Whether small codes with scales that are small whole numbers are multiplied exactly."""
    inputs = 2 * kind.inputs
    raw = (torch.arange(OUTPUTS * 2 * kind.bytes) * 7919 % 7).to(torch.uint8)
    blocks = raw.view(-1, kind.bytes)
    ones = torch.tensor([0, 0x3C], dtype=torch.uint8)
    blocks[:, list(kind.halves)] = ones.repeat(len(kind.halves) // 2)
    packed = torch.empty(kind.bytes_of(OUTPUTS, inputs), dtype=torch.uint8)
    if not pack_blocks(library, kind, raw, torch.arange(OUTPUTS), inputs, packed):
        return False
    parts = ((kind.number, OUTPUTS),)
    plan = LinearPlan(BLOCKS, OUTPUTS, inputs, packed, parts=parts)
    x = (torch.arange(ROWS * inputs) * 104729 % 255 - 127).view(ROWS, inputs).float()
    # in every group: the activations' scales are then exactly 1
    x[:, ::GROUP] = 127
    expected = x @ block_rows(library, plan, torch.arange(OUTPUTS)).T
    return torch.equal(linear(library, linear_struct(plan), x, 1), expected)


def _plans(weight: torch.Tensor) -> list[LinearPlan]:
    ones = torch.ones(len(weight))
    groups = torch.ones(len(weight), INPUTS // GROUP, dtype=torch.bfloat16)
    sizes = weight.shape[0], weight.shape[1]
    return [
        LinearPlan(F32, *sizes, pack.pack_floats(weight.float())),
        LinearPlan(BF16, *sizes, pack.pack_floats(weight.to(torch.bfloat16))),
        LinearPlan(INT8, *sizes, *pack.pack_int8(weight.to(torch.int8), ones)),
        LinearPlan(INT4, *sizes, pack.pack_int4(weight.to(torch.int8), groups)),
    ]
