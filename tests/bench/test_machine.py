from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from linspec.bench.library import info
from linspec.bench.machine import machine, set_threads
from linspec.cli import app
from linspec.errors import ConfigError
from linspec.kernels.cpu.library import load
from linspec.kernels.device import pick_device


def test_facts_about_this_machine() -> None:
    facts = machine()
    assert {"cpu", "cores", "threads", "ram_gb", "torch"} <= set(facts)
    assert facts["cores"] >= 1 and facts["ram_gb"] > 0


def test_info_names_the_kernel_and_why() -> None:
    facts = info()
    assert {"version", "torch", "device", "kernels", "threads"} <= set(facts)
    assert set(facts["kernels"]["linear"]) == {"name", "reason"}
    assert facts["kernels"]["triton"]["switch"] == "off"
    assert facts["kernels"]["cuda_graphs"] == {"switch": "auto"}
    assert facts["kernels"]["rounds_ahead"] == {"switch": "auto"}


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


@pytest.mark.parametrize(
    ("build", "fault", "said"),
    [
        (None, None, "(this torch was built without CUDA: install one that was)"),
        (
            "13.0",
            "Found no NVIDIA driver on your system. Please\nmore",
            "(Found no NVIDIA driver on",
        ),
        ("13.0", "The NVIDIA driver on your system is too old (found version 11040).", "too old"),
        ("13.0", None, "0 are here; use cpu"),
    ],
)
def test_why_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, build: str | None, fault: str | None, said: str
) -> None:
    def init() -> None:
        if fault is not None:
            raise RuntimeError(fault)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", build)
    with pytest.raises(ConfigError) as error:
        pick_device("cuda")
    assert said in str(error.value)
    assert "more" not in str(error.value)


WRONG = {
    "LINSPEC_THREADS": "abc",
    "LINSPEC_CPU_KERNELS": "foo",
    "LINSPEC_TRITON": "maybe",
    "LINSPEC_CUDA_GRAPHS": "x",
    "LINSPEC_ROUNDS_AHEAD": "x",
}


@pytest.mark.parametrize("model", [(), ("embedded-aug",)])
def test_info_ended_at_the_first_wrong_switch(
    monkeypatch: pytest.MonkeyPatch, model: tuple[str, ...]
) -> None:
    for name, word in WRONG.items():
        monkeypatch.setenv(name, word)
    load.cache_clear()
    try:
        done = CliRunner().invoke(app, ["info", *model, "--json"])
    finally:
        load.cache_clear()
    assert done.exit_code == 1
    facts = json.loads(done.stdout)
    assert facts["drafters"] if model else facts["cores"]
    for name in WRONG:
        assert f"error: {name}" in done.stderr and any(name in each for each in facts["errors"])
