"""Linear layers and steps are timed by the clock and told beside the speed of the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import model_dir
from gguf_files import tiny

from linspec.bench.kernels import FORMATS, NODES, KernelSpeeds, bench_kernels
from linspec.checkpoints.hub import load_model
from linspec.errors import ConfigError
from linspec.evaluate.quantize import quantize
from linspec.kernels.cpu.library import load


def measured(model: Path, *formats: str) -> KernelSpeeds:
    """With a clock on which everything takes a second, and memory of 2 kB/s."""
    ticks = iter(range(10_000))
    return bench_kernels(
        model, formats, repeats=2, clock=lambda: float(next(ticks)), roof=lambda: 2e-6
    )


def test_seconds_and_bytes_make_the_share_of_the_roof() -> None:
    found = measured(model_dir("softmax"), "float32")
    head = load_model(model_dir("softmax")).head
    outputs, inputs = head.out_features, head.in_features
    rows = [row for row in found.linears if (row.outputs, row.inputs) == (outputs, inputs)]
    assert [row.nodes for row in rows] == list(NODES)
    for row in rows:
        # a pass over all layers of a size takes the second
        assert (row.layers, row.seconds) == (1, 1.0)
        # kernels pad to tiles of 32 outputs
        size = 4 * -(-outputs // 32) * 32 * inputs
        assert row.gb_per_s == pytest.approx(size / 1e9, rel=1e-3)
        assert row.of_roof == pytest.approx(size / 1e9 / 2e-6, rel=1e-3)
    assert [row.times_one for row in found.steps] == [1.0] * len(found.steps)
    assert found.machine["read_gb_per_s"] == 2e-6
    several = [row for row in found.linears if row.layers > 1]
    assert several and all(row.seconds == 1 / row.layers for row in several)


def test_every_format_has_its_rows(tmp_path: Path) -> None:
    found = measured(model_dir("aug"))
    assert list(found.kernels) == list(FORMATS) == found.settings["formats"]
    assert (
        {row.format for row in found.linears} == {row.format for row in found.steps} == set(FORMATS)
    )
    (tmp_path / "text.txt").write_text("abcd end the end\n" * 40)
    quantize(
        model_dir("aug"), tmp_path / "q", bits=8, data=[tmp_path / "text.txt"], limit_bytes=300
    )
    assert {row.format for row in measured(tmp_path / "q").steps} == {"int8"}
    with pytest.raises(ConfigError, match="quantized to int8 and has no other format"):
        measured(tmp_path / "q", "int4")


@pytest.mark.skipif(load().library is None, reason=load().reason)
def test_a_file_has_its_own_blocks_too(tmp_path: Path) -> None:
    _, path = tiny("llama", tmp_path / "m.gguf", "Q4_0")
    found = measured(path, "blocks", "float32")
    assert "Q4_0" in found.kernels["blocks"] and "Q4_0" not in found.kernels["float32"]
    speeds = [row.gb_per_s for row in found.steps if row.nodes == 1]
    assert speeds[1] / speeds[0] == pytest.approx(32 / 4.5, rel=0.01)


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'int9'.*did you mean 'int8'"):
        measured(model_dir("aug"), "int9")
    with pytest.raises(ConfigError, match="repeats must be 1 or more, got 0"):
        bench_kernels(model_dir("aug"), repeats=0)
