"""One state of those of several layers, as drafters that read them have it on the C side.

struct = fusion_struct(FusionPlan(norms, layer))
lines = state_lines(pieces)               # where the states of each row lie
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, c_void_p, pointer
from dataclasses import dataclass
from typing import Any

import torch

from linspec.kernels.cpu.linear import linear_struct
from linspec.kernels.cpu.structs import FusionStruct, NormStruct
from linspec.kernels.step_plan import LinearPlan

# the states [n, D] of some rows, by layer
Piece = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class FusionPlan:
    """norms [D] float32 of each layer that is read; none where states are read as they are.

    layer: from all these to one state. out_norm [D]: of what comes out.
    """

    norms: tuple[torch.Tensor, ...]
    layer: LinearPlan
    out_norm: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Of a state."""
        return self.layer.outputs

    @property
    def read(self) -> int:
        """Layers that are read."""
        return self.layer.inputs // self.layer.outputs


def fusion_struct(plan: FusionPlan) -> FusionStruct:
    """As the C side reads it, which has addresses only: the caller keeps the plan."""
    norms = [pointer(NormStruct(weight=weight.data_ptr())) for weight in plan.norms]
    out = plan.out_norm
    return FusionStruct(
        read=plan.read,
        norm=(POINTER(NormStruct) * len(norms))(*norms) if norms else None,
        layer=pointer(linear_struct(plan.layer)),
        out_norm=None if out is None else pointer(NormStruct(weight=out.data_ptr())),
    )


def readable(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces as the C side reads them; those that a step of it handed out are so already."""
    return [[states.float().contiguous() for states in piece] for piece in pieces]


def state_lines(pieces: Sequence[Piece]) -> list[int]:
    """The addresses of the states of each row, layer by layer; of pieces that are readable."""
    lines: list[int] = []
    for piece in pieces:
        size = piece[0].shape[1] * 4
        starts = [states.data_ptr() for states in piece]
        lines += [at + row * size for row in range(len(piece[0])) for at in starts]
    return lines


def line_table(lines: Sequence[int]) -> Any:
    """Addresses as a table of the C side, which is never empty."""
    return (c_void_p * max(1, len(lines)))(*lines)
