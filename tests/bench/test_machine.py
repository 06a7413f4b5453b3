from __future__ import annotations

import pytest
import torch

from linspec.bench.machine import info, machine, set_threads
from linspec.errors import ConfigError
from linspec.kernels.device import pick_device


def test_facts_about_this_machine() -> None:
    facts = machine()
    assert {"cpu", "cores", "threads", "ram_gb", "torch"} <= set(facts)
    assert facts["cores"] >= 1 and facts["ram_gb"] > 0


def test_info_names_the_kernel_and_why() -> None:
    facts = info()
    assert {"version", "torch", "device", "kernels", "threads"} <= set(facts)
    assert set(facts["kernels"]["linear"]) == {"name", "reason"}


def test_threads() -> None:
    before = torch.get_num_threads()
    set_threads(None)
    assert torch.get_num_threads() == before
    set_threads(before)
    with pytest.raises(ConfigError, match="threads"):
        set_threads(0)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("cpu") == pick_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="no CUDA"):
        pick_device("cuda")
    for name in ("nonsense", "meta"):
        with pytest.raises(ConfigError, match="use cpu"):
            pick_device(name)
