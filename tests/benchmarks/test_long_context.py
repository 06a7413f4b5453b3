"""Long contexts: texts that are read in slices, ways by specs, tables, and drafts behind one reading."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import long_context
from benchmarks.long_context import kept, measure, read
from benchmarks.long_context_table import retained, tables
from benchmarks.long_context_ways import way_of
from benchmarks.long_drafts import measure as measure_drafts

MODEL = "embedded-softmax"


def test_a_spec_is_a_way() -> None:
    assert way_of("int8").kv == "int8"
    assert (way_of("lserve:exact=3").kv, way_of("lserve:exact=3").attention) == (
        "int8",
        "lserve:exact=3",
    )
    # a cache that evicts has no 8-bit form
    assert way_of("h2o:budget=64").kv == "auto"


def test_a_text_in_slices_is_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = way_of("pages:budget=64").load(MODEL)
    tokens, wanted = list(range(1, 301)), [5, 99, 100, 299]
    _, whole = read(llm, tokens, wanted)
    monkeypatch.setattr(long_context, "_SLICE", 100)
    state, pieces = read(llm, tokens, wanted)
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=2e-2)
    assert state.length(0) == 300


def test_measured_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context, "_STEPS", 2)
    options = argparse.Namespace(
        out=tmp_path / "rows.jsonl",
        ways=["int8", "pages:budget=64"],
        lengths=[700],
        items=2,
        keys=[1],
        texts=1,
        apart=True,
        ruler=0,
        model=MODEL,
        quantize=None,
        data=["stdlib"],
        speed_only=False,
        quality_only=False,
    )
    measure(options)
    written = options.out.read_text()
    measure(options)
    assert options.out.read_text() == written
    rows = [json.loads(line) for line in written.splitlines()]
    assert [row["kind"] for row in rows] == ["quality", "quality", "speed", "speed"]
    assert rows[3]["read_bytes"] < rows[3]["state_bytes"]
    assert rows[2]["processor_ms"] > 0
    shown = tables(kept(options.out), "int8")
    assert "| reads | 700 |" in shown
    assert shown.count("| `pages:budget=64` |") == 5
    assert len(rows[0]["right_1"]) == rows[0]["asked_1"]
    assert "(1.00×)" in shown


def test_recall_is_that_of_what_the_other_way_found() -> None:
    mine = {"asked_1": 4, "right_1": "1101", "asked_6": 2, "right_6": "00"}
    other = {"asked_1": 4, "right_1": "0111", "asked_6": 2, "right_6": "10"}
    assert retained(mine, other) == "2/3, 0/1"
    # of older measurements nobody knows
    assert retained({"asked_1": 4}, other) == "–"


def test_drafts_behind_one_reading(tmp_path: Path) -> None:
    options = argparse.Namespace(
        model=MODEL,
        drafters=["self-pages:64"],
        policy="4",
        length=400,
        texts=1,
        tokens=6,
        rounds=1,
        kv="int8",
        quantize=None,
        data=["stdlib"],
    )
    found = measure_drafts(options, str(tmp_path))
    assert set(found) == {"plain", "self-pages:64"}
    assert found["plain"]["tokens_per_round"] == 1.0
    assert found["self-pages:64"]["tokens_per_round"] > 1.0
