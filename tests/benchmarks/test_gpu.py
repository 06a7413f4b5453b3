"""The prepared run for a GPU, tried on the CPU: sections are kept, and what cannot run says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from linspec.errors import ConfigError
from studies.lib.cells import Cells

RUN = gpu.Run(torch.device("cpu"), quick=True, model="embedded-softmax", repeats=1)


def test_every_section_but_the_other_engine_runs_on_a_cpu(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    names = [name for name in gpu.SECTIONS if name != "transformers"]
    gpu.measure(RUN, cells, names)
    found = {name: cells.read(name) for name in names}
    assert set(found["plain"]["found"]) == {
        f"torch.{dtype} {way}"
        for dtype in ("bfloat16", "float32")
        for way in ("chosen", "unrecorded", "by layer")
    }
    assert all(each["found"]["nodes"]["64"]["ms"] > 0 for each in [found["large"]])


def test_finished_sections_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = Cells(tmp_path)
    cells.write("limits", {"found": {"copy_gb_per_s": 1.0}})
    monkeypatch.setitem(gpu.SECTIONS, "limits", lambda run: pytest.fail("it is there"))
    gpu.measure(RUN, cells, ["limits"])
    assert json.loads((tmp_path / "cells/limits.json").read_text())["found"]["copy_gb_per_s"] == 1.0


def test_too_little_memory_leaves_a_section_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: gpu.Run) -> dict[str, object]:
        """More than there is."""
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setitem(gpu.SECTIONS, "large", full)
    cells = Cells(tmp_path)
    gpu.measure(RUN, cells, ["large"])
    assert cells.read("large")["found"] == {"left_out": "CUDA out of memory."}


def test_unknown_sections_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no section 'small'; sections are limits, plain"):
        gpu.gpu.__wrapped__(tmp_path, "cpu", "smollm2", "small", 1, True)
