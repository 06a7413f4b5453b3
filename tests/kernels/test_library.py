"""How the compiled kernels are found, chosen, and done without."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from linspec.errors import ConfigError
from linspec.kernels.cpu import check, library
from linspec.kernels.selector import pick_kernel
from linspec.models.linear import PackedLinear, fused_linear


@pytest.fixture
def fresh() -> Iterator[None]:
    """`load` looks again, and forgets what it found when the test is over."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def test_without_the_extension_torch_is_used_and_said_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_path", lambda: None)
    with caplog.at_level(logging.WARNING, "linspec"):
        kernels = [pick_kernel(torch.zeros(1)) for _ in range(3)]
    assert len(caplog.records) == 1 and "the extension was not built" in caplog.text
    assert not kernels[0].name.startswith("linspec-")
    assert "not built" in kernels[0].reason
    plain = torch.nn.Linear(8, 4)
    fused = fused_linear(plain)
    assert isinstance(fused, PackedLinear)
    torch.testing.assert_close(fused(torch.ones(3, 8)), plain(torch.ones(3, 8)))


def test_a_library_that_computes_wrongly_is_not_used(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linspec.kernels.cpu.library import load

    monkeypatch.setattr(check, "passes", lambda found: False)
    assert load().library is None
    assert load().reason.endswith("failed its self-test")


def test_the_switch_turns_the_kernels_off(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "off")
    assert library.load() == library.Found(None, "torch", "LINSPEC_CPU_KERNELS=off")


def test_the_switch_names_an_instruction_set(
    fresh: None, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.SWITCH, isa)
    assert library.load().name == isa


@pytest.mark.parametrize("wanted", ["avx9", "neon-dotprod", "avx512-vnni"])
def test_what_this_processor_cannot_run_is_refused(
    fresh: None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = library.load().library
    if built is not None and wanted in library.instruction_sets(built):
        pytest.skip(f"this processor runs {wanted}")
    library.load.cache_clear()
    monkeypatch.setenv(library.SWITCH, wanted)
    with pytest.raises(ConfigError, match=rf"{wanted} cannot be used here.*portable"):
        library.load()
