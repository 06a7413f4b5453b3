"""What keeps Triton's kernels away is said by name."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from linspec.errors import ConfigError
from linspec.kernels.gpu.triton import available


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(available.INTERPRETED, raising=False)
    # whatever was found out before in this process
    monkeypatch.setattr(available, "_installed", lambda: True)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(available, "version", missing)
    monkeypatch.setattr(available, "_installed", available._installed.__wrapped__)
    assert available.why_not("cuda") is not None
    with pytest.raises(ConfigError, match=r"pip install 'linspec\[gpu\]'"):
        available.require("cuda")


def test_a_cpu_needs_the_interpreter(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "TRITON_INTERPRET=1" in (available.why_not("cpu") or "")
    monkeypatch.setenv(available.INTERPRETED, "1")
    assert available.why_not("cpu") is None


def test_a_missing_driver_is_named(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (available.why_not("cuda") or "").startswith("no CUDA device can be used (")


def test_an_old_device_is_named(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
    assert "capability 7.5; 8.0 is needed" in (available.why_not("cuda") or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))
    assert available.why_not("cuda") is None


def test_the_switch_is_off_and_its_words_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv(available.SWITCH, raising=False)
    assert not available.chosen(cpu)
    monkeypatch.setenv(available.SWITCH, "yes")
    with pytest.raises(ConfigError, match="LINSPEC_TRITON must be one of off, on, got 'yes'"):
        available.chosen(cpu)


def test_on_is_an_error_where_kernels_cannot_run(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(available.SWITCH, "on")
    with pytest.raises(ConfigError, match="Triton has no code for device 'cpu'"):
        available.chosen(torch.device("cpu"))
