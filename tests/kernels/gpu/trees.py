"""Random steps over random buffers, for kernels that read token trees."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, settings

from linspec.decoding.static_mask import SlotNodes, StepTables
from linspec.decoding.tree import shape_of
from linspec.decoding.tree_paths import TreePaths, tree_paths

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1",
            reason="Triton compiles for the CUDA device here",
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
# the interpreter takes seconds for a step, and shrinking takes hundreds of them
DRAWN = settings(deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class Step:
    """The tables of a step, as kernels take them."""

    tables: StepTables
    slots: torch.Tensor
    held: torch.Tensor
    paths: TreePaths


def step_of(
    device: str, slots: list[int], held: list[int], parents: list[list[int]], new: int
) -> Step:
    """A step of slots with staged nodes of these parents, the last `new` of which are new."""
    tables = StepTables(len(slots), new, 1, torch.device(device))
    tables.fill(
        [
            SlotNodes(slot, [0] * new, [0] * new, shape_of(tree), [rows], [0])
            for slot, rows, tree in zip(slots, held, parents, strict=True)
        ]
    )
    paths = tree_paths(tables.ancestors, tables.depths, tables.nodes)
    return Step(tables, tables.slots, tables.held[0], paths)
