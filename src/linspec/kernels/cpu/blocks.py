"""Weights in the blocks of a GGUF file: into tiles, and rows of tiles as floats. Needs the library.

    pack_blocks(library, kind, raw, order, inputs, to)        # a part of a layer
    block_rows(library, plan, torch.tensor([3, 7]))           # what these rows stand for, [2, inputs]

`csrc/blocks.h` says what lies where. No value is changed on the way.
"""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch

from linspec.kernels.cpu.structs import LinearPartStruct
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.step_plan import LinearPlan
from linspec.quantization.blocks import BY_NUMBER, BlockFormat


def pack_blocks(
    library: ctypes.CDLL,
    kind: BlockFormat,
    raw: torch.Tensor,
    order: torch.Tensor,
    inputs: int,
    to: torch.Tensor,
) -> bool:
    """Write tiles of the rows `order` of the bytes of a tensor to the bytes `to`.

    Returns whether all scales among them are finite.
    """
    rows = order.to(torch.int64).contiguous()
    row_bytes = inputs // kind.inputs * kind.bytes
    assert raw.is_contiguous() and raw.numel() % row_bytes == 0 and inputs % kind.inputs == 0
    assert not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) < raw.numel() // row_bytes
    assert to.numel() == kind.bytes_of(len(rows), inputs) and to.dtype == torch.uint8
    sound = library.ls_pack_blocks(
        kind.number,
        *(raw.data_ptr(), rows.data_ptr(), len(rows), inputs),
        *(to.data_ptr(), native_threads()),
    )
    return bool(sound)


def part_structs(plan: LinearPlan) -> ctypes.Array[LinearPartStruct]:
    """The parts of a layer of blocks as the C side sees them; its tensor must outlive them."""
    table = (LinearPartStruct * len(plan.parts))()
    at = plan.weights.data_ptr()
    for entry, (number, outputs) in zip(table, plan.parts, strict=True):
        entry.format, entry.outputs, entry.weights = number, outputs, at
        at += BY_NUMBER[number].bytes_of(outputs, plan.inputs)
    return table


def bytes_of_parts(plan: LinearPlan) -> int:
    """Bytes that the tensor of a layer of blocks must have."""
    return sum(BY_NUMBER[number].bytes_of(count, plan.inputs) for number, count in plan.parts)


def block_rows(library: ctypes.CDLL, plan: LinearPlan, rows: torch.Tensor) -> torch.Tensor:
    """Weights [N, inputs] of the outputs `rows` [N] of a layer of blocks, in float32; a new tensor.

    Raises IndexError for an output that the layer does not have.
    """
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < plan.outputs:
        raise IndexError(
            f"rows {int(rows.min())} to {int(rows.max())} are not all in 0..{plan.outputs - 1}"
        )
    found, first = torch.empty(len(rows), plan.inputs), 0
    for part in part_structs(plan):
        mine = ((rows >= first) & (rows < first + part.outputs)).nonzero()[:, 0]
        found[mine] = _rows_of(library, part, plan.inputs, rows[mine] - first)
        first += part.outputs
    return found


def _rows_of(
    library: ctypes.CDLL, part: LinearPartStruct, inputs: int, rows: torch.Tensor
) -> torch.Tensor:
    rows = rows.to(torch.int64).contiguous()
    to = torch.empty(len(rows), inputs)
    library.ls_block_rows_at(
        byref(part), inputs, rows.data_ptr(), len(rows), to.data_ptr(), native_threads()
    )
    return to
