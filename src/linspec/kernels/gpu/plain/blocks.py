"""Weights in the blocks of a GGUF file as floats, on any device: see `triton/blocks.py`."""

from __future__ import annotations

import torch

from linspec.kernels.gpu.block_forms import FORMS, LEVELS, BlockForm
from linspec.kernels.step_plan import LinearPlan
from linspec.quantization.blocks import BY_NUMBER, TILE


def block_weight(plan: LinearPlan) -> torch.Tensor:
    """The float32 weights [outputs, inputs] of a plan of kind BLOCKS; a new tensor."""
    made, at = [], 0
    for number, outputs in plan.parts:
        kind = BY_NUMBER[number]
        size = kind.bytes_of(outputs, plan.inputs)
        tiles = plan.weights[at : at + size].view(-1, kind.tile_bytes(plan.inputs))
        made.append(_floats(FORMS[kind.name], tiles).flatten(0, 1)[:outputs])
        at += size
    return torch.cat(made)


def block_outputs(plan: LinearPlan, outputs: torch.Tensor) -> torch.Tensor:
    """float32 weights [N, inputs] of the `outputs` [N] of a matrix of one part, as they are looked up."""
    ((number, _),) = plan.parts
    kind = BY_NUMBER[number]
    tiles = plan.weights.view(-1, kind.tile_bytes(plan.inputs))[outputs // TILE]
    made = _floats(FORMS[kind.name], tiles)
    return made[torch.arange(len(made), device=made.device), outputs % TILE]


def _floats(form: BlockForm, tiles: torch.Tensor) -> torch.Tensor:
    """[T, 32, inputs] of the bytes [T, .] of T tiles."""
    whole = tiles.view(len(tiles), -1, form.together)
    halves = whole[..., : form.header].contiguous().view(torch.float16).float()
    # [T, supers, 1, 32 channels, 1], and groups [T, supers, share, bytes]
    scales, minima = (
        part.unflatten(-1, (1, TILE, 1)) for part in (halves[..., :TILE], halves[..., -TILE:])
    )
    groups = whole[..., form.header :].unflatten(2, (form.share, form.group))
    factors, high, low = groups.split((form.factors, form.high, form.low), dim=3)
    weights = _codes(form, high, low).float() - form.offset
    if form.by_sixteen:
        scales = scales * _lines(factors.contiguous().view(torch.int8)).repeat_interleave(16, -1)
    elif form.factors:
        lines = _lines(factors)
        scales, minima = scales * lines[..., :1], -minima * lines[..., 1:]
    weights = scales * weights
    if form.minima:
        weights = weights + minima
    return weights.permute(0, 3, 1, 2, 4).flatten(2)


def _codes(form: BlockForm, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Codes [.., 32 channels, 32 inputs] of bytes [.., high] and [.., low]."""
    quads = low.unflatten(-1, (-1, TILE, 4)).movedim(-2, -3)  # [.., 32, 4 or 8 quads, 4]
    codes = quads if form.bits == 8 else torch.cat((quads & 15, quads >> 4), dim=-2)
    quad = torch.arange(8, device=low.device, dtype=torch.uint8)[:, None]
    if form.bits == 5:
        codes = codes | (high.unflatten(-1, (TILE, 1, 4)) >> quad & 1) << 4
    if form.bits == 6:
        bits = high.unflatten(-1, (2, TILE, 4)).movedim(-2, -3).repeat_interleave(4, dim=-2)
        codes = codes | (bits >> 2 * (quad % 4) & 3) << 4
    codes = codes.flatten(-2)
    if form.levels:
        return torch.tensor(LEVELS, device=low.device)[codes.long()]
    return codes


def _lines(factors: torch.Tensor) -> torch.Tensor:
    """Two factors for each channel: [.., 64] -> [.., 32, 2], as floats."""
    return factors.unflatten(-1, (2, TILE)).movedim(-1, -2).float()
