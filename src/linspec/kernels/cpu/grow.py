"""Trees of a drafter of one fused layer in one call of the C library: no Python between levels or nodes.

grow = GrowCall(ids, top=4, normed=True)
grow.trees(kernel, [Seed(slot, committed, nodes, depth, state, tokens, shares)])
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch

from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.space import Space
from linspec.kernels.cpu.step import CpuStep
from linspec.kernels.cpu.structs import MAX_NODES, DecoderStruct, GrowthStruct
from linspec.kernels.cpu.threads import native_threads


class Seed(NamedTuple):
    """What the tree of one sequence grows from.

    slot, committed: where its rows are, and how many. nodes, depth: the largest tree. state [D] float32: what
    the children of the root go on from, which are `tokens`, with the logarithms of their `shares`.
    """

    slot: int
    committed: int
    nodes: int
    depth: int
    state: torch.Tensor
    tokens: Sequence[int]
    shares: Sequence[float]


class Grown(NamedTuple):
    """A tree: draft nodes behind a root, which is node 0, with the logarithms of their shares."""

    tokens: list[int]
    parents: list[int]
    shares: list[float]


class GrowCall:
    """Trees from one fused layer.

    ids: the tokens that can be drafted. top: children of a node, and nodes of a level that get children.
    normed: drafts go on from normalized states. Needs the compiled library.
    """

    def __init__(self, ids: Sequence[int], top: int, normed: bool) -> None:
        library = load().library
        assert library is not None
        self._call, self._workspace = _functions(library)
        self.top, self.normed = top, normed
        self._ids = (c_int32 * len(ids))(*ids)
        self._space = Space()

    def trees(self, kernel: CpuStep, seeds: Sequence[Seed]) -> list[Grown]:
        """The tree of each seed, by the kernel of the layer.

        It knows where the state is, which has room for MAX_NODES staged rows in each slot.
        """
        count, every = len(seeds), len(seeds) * MAX_NODES
        states = [seed.state.contiguous() for seed in seeds]
        tokens, parents = (c_int32 * every)(), (c_int32 * every)()
        shares, found = (c_float * every)(), (c_int32 * count)()
        for at, seed in enumerate(seeds):
            tokens[at * MAX_NODES : at * MAX_NODES + self.top] = list(seed.tokens)
            shares[at * MAX_NODES : at * MAX_NODES + self.top] = list(seed.shares)
        levels = max(seed.depth for seed in seeds)
        cosines, sines = kernel.turned(max(seed.committed for seed in seeds) + levels)
        asked = GrowthStruct(
            sequences=count,
            top=self.top,
            levels=levels,
            normed=self.normed,
            slots=_ints([seed.slot for seed in seeds]),
            committed=_ints([seed.committed for seed in seeds]),
            nodes=_ints([seed.nodes for seed in seeds]),
            depths=_ints([seed.depth for seed in seeds]),
            ids=self._ids,
            states=(c_void_p * count)(*(state.data_ptr() for state in states)),
            cosines=cosines,
            sines=sines,
            tokens=tokens,
            parents=parents,
            shares=ctypes.addressof(shares),
            found=found,
        )
        decoder = kernel.decoder
        space = self._space.at_least(self._workspace(decoder, asked))
        self._call(byref(decoder), byref(asked), space, native_threads())
        ranges = [slice(at * MAX_NODES, at * MAX_NODES + found[at]) for at in range(count)]
        return [Grown(tokens[each], parents[each], shares[each]) for each in ranges]


def _ints(numbers: Sequence[int]) -> ctypes.Array[c_int32]:
    return (c_int32 * len(numbers))(*numbers)


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    library.ls_grow_workspace.restype = c_int64
    library.ls_grow_workspace.argtypes = [POINTER(DecoderStruct), POINTER(GrowthStruct)]
    library.ls_grow.restype = None
    library.ls_grow.argtypes = [
        POINTER(DecoderStruct),
        POINTER(GrowthStruct),
        c_void_p,
        c_int32,
    ]
    return library.ls_grow, library.ls_grow_workspace
