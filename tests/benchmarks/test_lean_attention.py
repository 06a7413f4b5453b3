"""The benchmark of ragged batches: what a line says, and that both ways take steps."""

from __future__ import annotations

import ctypes

import pytest

from benchmarks.lean_attention import SHAPES, Ragged, rows
from linspec.kernels.cpu.library import load


@pytest.fixture
def library(two_threads: None) -> ctypes.CDLL:
    found = load()
    if found.library is None:
        pytest.skip(found.reason)
    return found.library


def test_every_shape_and_cache_is_timed(library: ctypes.CDLL) -> None:
    found = list(rows((700, 60, 60), ("float", "int8"), layers=1, repeats=2))
    assert [(each.shape, each.kind) for each in found] == [
        (shape, kind) for shape in SHAPES for kind in ("float", "int8")
    ]
    assert all(len(each.lean) == len(each.split) == 2 for each in found)
    assert all(min(each.lean + each.split) > 0 for each in found)


def test_a_line_says_both_ratios() -> None:
    line = str(Ragged("SmolLM2", "int8", [0.1, 0.2, 0.2], [0.3, 0.3, 0.4]))
    assert "200.00 ms" in line
    assert "split ÷ line 1.50 (of the least 3.00)" in line
