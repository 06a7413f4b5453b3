"""Medusa heads in one call of the C library: from hidden states to the likeliest tokens of every head.

call = HeadsCall(blocks, outputs)
call.guess(hidden, heads=3, top=10)     # [rows][heads * top] token ids
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_void_p, pointer
from typing import Any

import torch

from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.linear import linear_struct
from linspec.kernels.cpu.space import Space
from linspec.kernels.cpu.structs import GuessStruct, HeadsStruct, LinearStruct
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.step_plan import LinearPlan

# a block of every head: its first layers, and its second ones where it has any
Blocks = Sequence[tuple[Sequence[LinearPlan], Sequence[LinearPlan]]]


class HeadsCall:
    """Heads as the table that the C side reads.

    outputs: the output layer of each head, or one that all share. width: of the features; the first block may
    read more than these. Needs the compiled library.
    """

    def __init__(self, blocks: Blocks, outputs: Sequence[LinearPlan], width: int) -> None:
        library = load().library
        assert library is not None
        self._call, self._workspace = _functions(library)
        first = [layer for layers, _ in blocks for layer in layers]
        back = [layer for _, layers in blocks for layer in layers]
        # the table has addresses only
        self._layers = [*first, *back, *outputs]
        self._heads = HeadsStruct(
            heads=len(first) // len(blocks),
            blocks=len(blocks),
            width=width,
            seen=first[0].inputs,
            inner=first[0].outputs,
            vocabulary=outputs[0].outputs,
            shared=len(outputs) == 1,
            first=_table(first),
            back=_table(back) if back else None,
            out=_table(outputs),
        )
        self._space = Space()

    def guess(self, hidden: Sequence[torch.Tensor], heads: int, top: int) -> list[list[int]]:
        """The `top` likeliest tokens of the first `heads` heads, side by side, for each row.

        hidden: float32 [.] of each row, what the first block reads.
        """
        rows, count = len(hidden), heads * top
        lines = [line.contiguous() for line in hidden]
        tokens = (c_int32 * (rows * count))()
        asked = GuessStruct(
            rows=rows,
            heads=heads,
            top=top,
            hidden=(c_void_p * rows)(*(line.data_ptr() for line in lines)),
            tokens=tokens,
        )
        space = self._space.at_least(self._workspace(self._heads, asked))
        self._call(byref(self._heads), byref(asked), space, native_threads())
        return [tokens[row * count : (row + 1) * count] for row in range(rows)]


def _table(layers: Sequence[LinearPlan]) -> Any:
    return (POINTER(LinearStruct) * len(layers))(*(pointer(linear_struct(x)) for x in layers))


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    library.ls_heads_workspace.restype = c_int64
    library.ls_heads_workspace.argtypes = [POINTER(HeadsStruct), POINTER(GuessStruct)]
    library.ls_heads_guess.restype = None
    library.ls_heads_guess.argtypes = [
        POINTER(HeadsStruct),
        POINTER(GuessStruct),
        c_void_p,
        c_int32,
    ]
    return library.ls_heads_guess, library.ls_heads_workspace
