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

from linspec.kernels.cpu.library import LinearStruct, Table, load
from linspec.kernels.cpu.linear import NativeLinear
from linspec.kernels.cpu.space import Space
from linspec.kernels.cpu.threads import native_threads

# a block of every head: its first layers, and its second ones where it has any
Blocks = Sequence[tuple[Sequence[NativeLinear], Sequence[NativeLinear]]]


class _Heads(Table):
    """`ls_heads` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int32) for name in ("heads", "blocks", "width", "inner", "vocabulary")),
        ("shared", c_int32),
        *((name, POINTER(POINTER(LinearStruct))) for name in ("first", "back", "out")),
    )


class _Guess(Table):
    """`ls_guess` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "heads", "top")),
        ("hidden", POINTER(c_void_p)),
        ("tokens", POINTER(c_int32)),
    )


class HeadsCall:
    """Heads as the table that the C side reads; the layers must outlive it.

    outputs: the output layer of each head, or one that all share. Needs the compiled library.
    """

    def __init__(self, blocks: Blocks, outputs: Sequence[NativeLinear]) -> None:
        library = load().library
        assert library is not None
        self._call, self._workspace = _functions(library)
        first = [layer for layers, _ in blocks for layer in layers]
        back = [layer for _, layers in blocks for layer in layers]
        self._heads = _Heads(
            heads=len(first) // len(blocks),
            blocks=len(blocks),
            width=first[0].in_features,
            inner=first[0].out_features,
            vocabulary=outputs[0].out_features,
            shared=len(outputs) == 1,
            first=_table(first),
            back=_table(back) if back else None,
            out=_table(outputs),
        )
        self._space = Space()

    def guess(self, hidden: Sequence[torch.Tensor], heads: int, top: int) -> list[list[int]]:
        """The `top` likeliest tokens of the first `heads` heads, side by side, for each row.

        hidden: float32 [D] of each row.
        """
        rows, count = len(hidden), heads * top
        lines = [line.contiguous() for line in hidden]
        tokens = (c_int32 * (rows * count))()
        asked = _Guess(
            rows=rows,
            heads=heads,
            top=top,
            hidden=(c_void_p * rows)(*(line.data_ptr() for line in lines)),
            tokens=tokens,
        )
        space = self._space.at_least(self._workspace(self._heads, asked))
        self._call(byref(self._heads), byref(asked), space, native_threads())
        return [tokens[row * count : (row + 1) * count] for row in range(rows)]


def _table(layers: Sequence[NativeLinear]) -> Any:
    return (POINTER(LinearStruct) * len(layers))(*(pointer(layer.struct()) for layer in layers))


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    library.ls_heads_workspace.restype = c_int64
    library.ls_heads_workspace.argtypes = [POINTER(_Heads), POINTER(_Guess)]
    library.ls_heads_guess.restype = None
    library.ls_heads_guess.argtypes = [POINTER(_Heads), POINTER(_Guess), c_void_p, c_int32]
    return library.ls_heads_guess, library.ls_heads_workspace
