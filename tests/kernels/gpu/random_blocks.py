"""Layers of random blocks, of finite scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linspec.kernels.cpu.blocks import pack_blocks
from linspec.kernels.cpu.library import load
from linspec.kernels.step_plan import BLOCKS, LinearPlan
from linspec.quantization.blocks import BLOCK_FORMATS, BlockFormat


def plan_of(
    parts: Sequence[tuple[str, int]], inputs: int, device: str = "cpu", *, bias: bool = False
) -> LinearPlan:
    """Matrices of named formats with so many outputs each, one below the other."""
    tiles = [_tiles(BLOCK_FORMATS[name], outputs, inputs) for name, outputs in parts]
    outputs = sum(count for _, count in parts)
    added = torch.randn(outputs, device=device) if bias else None
    numbers = tuple((BLOCK_FORMATS[name].number, count) for name, count in parts)
    return LinearPlan(BLOCKS, outputs, inputs, torch.cat(tiles).to(device), None, added, numbers)


def _tiles(kind: BlockFormat, outputs: int, inputs: int) -> torch.Tensor:
    library = load().library
    assert library is not None
    raw = torch.randint(256, (outputs, inputs // kind.inputs, kind.bytes), dtype=torch.uint8)
    halves = torch.randn(*raw.shape[:2], len(kind.halves) // 2) / 64
    raw[..., list(kind.halves)] = halves.half().view(torch.uint8)
    tiles = torch.empty(kind.bytes_of(outputs, inputs), dtype=torch.uint8)
    sound = pack_blocks(library, kind, raw.flatten(), torch.arange(outputs), inputs, tiles)
    assert sound
    return tiles
