"""Weights in the order that the C kernels read: tiles of 32 output channels, interleaved.

`LinearStruct` says what lies where. Widths that are not multiples are padded with zeros, so any
width works.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.kernels.cpu.structs import TILE
from linspec.kernels.step_plan import INT4, INT8
from linspec.quantization.codes import GROUP


def up(size: int, multiple: int) -> int:
    """`size` rounded up."""
    return -(-size // multiple) * multiple


def pack_floats(weight: torch.Tensor) -> torch.Tensor:
    """float32 or bfloat16 [N, K] -> [tiles, K, 32]."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % TILE))
    return padded.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def unpack_floats(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """The inverse of `pack_floats`."""
    return packed.transpose(1, 2).flatten(0, 1)[:outputs].contiguous()


def float_rows(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows [N] of what `pack_floats` packed: [N, K]."""
    return packed[rows // TILE, :, rows % TILE]


def pack_int8(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [N, K] with scales [N] -> bytes [tiles, K' / 4, 32, 4] and scales [tiles * 32]."""
    count, width = codes.shape
    padded = F.pad(codes, (0, -width % GROUP, 0, -count % TILE))
    lines = padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()
    return lines.view(torch.uint8) ^ 128, F.pad(scales.float(), (0, -count % TILE))


def unpack_int8(
    packed: torch.Tensor, scales: torch.Tensor, outputs: int, inputs: int
) -> torch.Tensor:
    """float32 weights [N, K] of `pack_int8`."""
    codes = (packed ^ 128).view(torch.int8).transpose(1, 2).flatten(2).flatten(0, 1)
    return codes[:outputs, :inputs].float() * scales[:outputs, None]


def pack_int4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes -8..7 [N, K] with bfloat16 scales [N, K' / 32] -> bytes [tiles, K' / 32, 576]."""
    count, width = codes.shape
    padded = F.pad(codes, (0, -width % GROUP, 0, -count % TILE)) + 8
    # [tiles, 32 channels, groups, low or high, 4 quads, 4 inputs]
    parts = padded.view(torch.uint8).view(-1, TILE, up(width, GROUP) // GROUP, 2, 4, 4)
    both = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    lines = both.permute(0, 2, 3, 1, 4).flatten(2)
    factors = F.pad(scales, (0, 0, 0, -count % TILE)).unflatten(0, (-1, TILE)).transpose(1, 2)
    return torch.cat((factors.contiguous().view(torch.uint8), lines), dim=2).contiguous()


def unpack_int4(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """float32 weights [N, K] of `pack_int4`."""
    tiles, groups = packed.shape[:2]
    factors = packed[:, :, : 2 * TILE].contiguous().view(torch.bfloat16)  # [tiles, groups, 32]
    both = packed[:, :, 2 * TILE :].reshape(tiles, groups, 4, TILE, 4)
    parts = torch.stack((both & 15, both >> 4), dim=2).float() - 8
    weight = parts.permute(0, 4, 1, 2, 3, 5).flatten(3)  # [tiles, 32, groups, 32]
    weight = weight * factors.transpose(1, 2)[..., None].float()
    return weight.flatten(0, 1).flatten(1)[:outputs, :inputs].contiguous()


def packed_shapes(
    kind: int, outputs: int, inputs: int
) -> tuple[tuple[int, ...], tuple[int] | None]:
    """Shapes of the packed weights and of their separate scales, if any."""
    tiles, padded = up(outputs, TILE) // TILE, up(inputs, GROUP)
    if kind == INT8:
        return (tiles, padded // 4, TILE, 4), (tiles * TILE,)
    if kind == INT4:
        return (tiles, padded // GROUP, 2 * TILE + GROUP * TILE // 2), None
    return (tiles, inputs, TILE), None
