"""Trees of a drafter of one fused layer in one call of the C library: no Python between entries and nodes.

grow = GrowCall(fusion, ids, top=4, normed=True, slots=2)
grow.trees(kernel, [Fresh(nodes, pieces)], [Seed(slot, committed, nodes, depth)])
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p, pointer
from typing import Any, NamedTuple

import torch

from linspec.kernels.cpu.fusion import (
    FusionPlan,
    Piece,
    fusion_struct,
    line_table,
    readable,
    state_lines,
)
from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.space import Space
from linspec.kernels.cpu.step import CpuStep
from linspec.kernels.cpu.structs import MAX_NODES, DecoderStruct, GrowthStruct
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.step_plan import NewNodes


class Fresh(NamedTuple):
    """Entries of one slot that are made before its tree grows.

    nodes: a chain of at most MAX_NODES, each with the token of its entry. pieces: the target's states of
    them, one piece behind the other.
    """

    nodes: NewNodes
    pieces: Sequence[Piece]


class Seed(NamedTuple):
    """A tree that is asked for, and its largest size. committed: entries of its slot, fresh ones too."""

    slot: int
    committed: int
    nodes: int
    depth: int


class Grown(NamedTuple):
    """A tree: draft nodes behind a root, which is node 0, with the logarithms of their shares."""

    tokens: list[int]
    parents: list[int]
    shares: list[float]


class GrowCall:
    """Trees from one fused layer; it keeps the state and likeliest tokens of the newest entry of each slot.

    ids: the tokens that can be drafted. top: children of a node, and nodes of a level that get children.
    normed: drafts go on from normalized states. Needs the compiled library.
    """

    def __init__(
        self, fusion: FusionPlan, ids: Sequence[int], top: int, normed: bool, slots: int
    ) -> None:
        library = load().library
        assert library is not None
        self._call, self._workspace = _functions(library)
        # the table has addresses only
        self._plan, self._fusion = fusion, fusion_struct(fusion)
        self.top, self.normed = top, normed
        self._ids = (c_int32 * len(ids))(*ids)
        self._ends = torch.zeros(slots, fusion.width)
        self._end_tokens = (c_int32 * (slots * top))()
        self._end_shares = (c_float * (slots * top))()
        self._space = Space()

    def trees(self, kernel: CpuStep, fresh: Sequence[Fresh], seeds: Sequence[Seed]) -> list[Grown]:
        """The tree of each seed, by the kernel of the layer; slots without fresh entries go on as before.

        The kernel knows where the state is, which has room for the fresh entries of a slot and MAX_NODES
        staged ones behind them.
        """
        count, every = len(seeds), len(seeds) * MAX_NODES
        tokens, parents = (c_int32 * every)(), (c_int32 * every)()
        shares, found = (c_float * every)(), (c_int32 * count)()
        levels = max(seed.depth for seed in seeds)
        pieces = [readable(each.pieces) for each in fresh]
        lines = [line for each in pieces for line in state_lines(each)]
        batch = kernel.batch([each.nodes for each in fresh]) if fresh else None
        cosines, sines = kernel.turned(max(seed.committed for seed in seeds) + levels)
        asked = GrowthStruct(
            sequences=count,
            top=self.top,
            levels=levels,
            normed=self.normed,
            fresh=None if batch is None else pointer(batch),
            fusion=pointer(self._fusion),
            read_states=line_table(lines),
            ends=self._ends.data_ptr(),
            end_tokens=self._end_tokens,
            end_shares=ctypes.addressof(self._end_shares),
            slots=_ints([seed.slot for seed in seeds]),
            committed=_ints([seed.committed for seed in seeds]),
            nodes=_ints([seed.nodes for seed in seeds]),
            depths=_ints([seed.depth for seed in seeds]),
            ids=self._ids,
            cosines=cosines,
            sines=sines,
            tokens=tokens,
            parents=parents,
            shares=ctypes.addressof(shares),
            found=found,
        )
        decoder = kernel.decoder
        threads = native_threads()
        space = self._space.at_least(self._workspace(decoder, asked, threads))
        self._call(byref(decoder), byref(asked), space, threads)
        ranges = [slice(at * MAX_NODES, at * MAX_NODES + found[at]) for at in range(count)]
        return [Grown(tokens[each], parents[each], shares[each]) for each in ranges]


def _ints(numbers: Sequence[int]) -> ctypes.Array[c_int32]:
    return (c_int32 * len(numbers))(*numbers)


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    library.ls_grow_workspace.restype = c_int64
    library.ls_grow_workspace.argtypes = [POINTER(DecoderStruct), POINTER(GrowthStruct), c_int32]
    library.ls_grow.restype = None
    library.ls_grow.argtypes = [
        POINTER(DecoderStruct),
        POINTER(GrowthStruct),
        c_void_p,
        c_int32,
    ]
    return library.ls_grow, library.ls_grow_workspace
