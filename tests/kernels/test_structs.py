"""The one table of what Python and C share."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from linspec.errors import StateError
from linspec.kernels.cpu import library as kernels
from linspec.kernels.cpu import structs
from linspec.kernels.cpu.structs import LinearStruct, MixerPartStruct

HEADER = Path(structs.__file__).parent / "csrc" / "structs.h"


@pytest.fixture
def fresh() -> Iterator[None]:
    kernels.load.cache_clear()
    yield
    kernels.load.cache_clear()


def test_the_header_is_what_the_table_says() -> None:
    assert HEADER.read_text(encoding="utf-8") == structs.header(), (
        "write it again: python -m linspec.kernels.cpu.structs > csrc/structs.h"
    )


@pytest.mark.parametrize("field", range(3))
def test_a_library_of_other_structures_is_not_used(
    fresh: None, library: ctypes.CDLL, field: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = structs.layout()
    numbers[field] += 8
    monkeypatch.setattr(kernels, "layout", lambda: numbers)
    assert kernels.load().library is None
    assert "is of another version" in kernels.load().reason


def test_numbers_of_structures_are_checked() -> None:
    with pytest.raises(StateError, match="outputs is -2147483649"):
        LinearStruct(outputs=-(2**31) - 1)
    with pytest.raises(StateError, match="group is 9223372036854775808"):
        MixerPartStruct().group = 2**63
    layer = MixerPartStruct(group=2**63 - 1, alpha=0.5)
    assert (layer.group, layer.alpha) == (2**63 - 1, 0.5)
