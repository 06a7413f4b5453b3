"""Every instruction set that this machine can run, one after the other."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from linspec.kernels.cpu.library import instruction_sets, load

FOUND = load()
SETS = instruction_sets(FOUND.library) if FOUND.library is not None else []


@pytest.fixture(autouse=True)
def shared_out(two_threads: None) -> None:
    """Every test of the kernels runs on two threads."""


@pytest.fixture
def library() -> ctypes.CDLL:
    """The compiled kernels."""
    if FOUND.library is None:
        pytest.skip(FOUND.reason)
    return FOUND.library


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[str]:
    """An instruction set, in use during the test."""
    before = library.ls_isa()
    assert library.ls_use_isa(request.param.encode())
    yield request.param
    assert library.ls_use_isa(before)
