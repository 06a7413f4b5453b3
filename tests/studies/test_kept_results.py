"""The cells and pages of docs/results: cells of 0.1.0 load, and pages are what their cells say."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linspec.errors import CheckpointError
from linspec.utils.format_version import CURRENT
from studies.lib.cells import Cells
from studies.linearized_llm import TABLES, Plan
from studies.linearized_llm.cache import Cache
from studies.linearized_llm.encoders import Encoders
from studies.linearized_llm.page import write_page
from studies.linearized_llm.plan import SIZES
from studies.linearized_llm.seq2seq import Seq2Seq
from studies.linearized_llm.table import Results

KEPT = Path(__file__).parents[2] / "docs" / "results"
DOMAINS = ("stdlib", "wikitext2", "gsm8k")


def records(name: str) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in (KEPT / name / "cells").glob("*.json")}


@pytest.mark.parametrize("name", ["paper", "recall"])
def test_kept_cells_load_and_are_named_by_what_determines_them(name: str) -> None:
    found = records(name)
    assert len(found) >= 20
    cells = Cells(KEPT / name)
    for key, record in found.items():
        assert cells.read(key) == record
        told = json.dumps([1, record["kind"], record["settings"], record["seed"]], sort_keys=True)
        assert key == f"{record['kind']}-{hashlib.sha256(told.encode()).hexdigest()[:20]}"


def test_records_say_their_format_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    cells.write("a-1", {"result": 1})
    assert cells.read("a-1") == {"format_version": CURRENT, "result": 1}
    (cells.folder / "a-2.json").write_text('{"result": 2}')
    (cells.folder / "a-3.json").write_text('{"resu')
    (cells.folder / "a-4.json").write_text("[]")
    assert [record["result"] for record in cells.all("a-")] == [1, 2]
    (cells.folder / "a-5.json").write_text('{"format_version": "9.1", "result": 3}')
    with pytest.raises(CheckpointError, match=r"has format_version 9\.1, and this linspec knows"):
        cells.read("a-5")


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of the kept page. What tells its texts and models apart is taken from the cells."""
    found = [record["settings"] for record in records("paper").values()]

    def said(name: str, **where: str) -> str:
        fits = (s for s in found if name in s and where.items() <= s.items())
        return str(next(fits, {}).get(name, "-"))

    plan = Plan(
        KEPT / "paper",
        domains={name: (name,) for name in DOMAINS},
        size=SIZES["default"],
        seeds=3,
        encoder="the encoder",
    )
    recipes = [r["settings"] for r in records("paper").values() if r["kind"] == "recipe"]
    t5 = [r["settings"] for r in records("paper").values() if r["kind"] == "t5"]
    vars(plan)["weights"] = recipes[0]["teacher"]
    vars(plan)["text"] = recipes[0]["text"]
    vars(plan)["texts"] = {name: said("text", domain=name) for name in DOMAINS}
    monkeypatch.setattr(Encoders, "_identity", said("encoder"))
    original = SimpleNamespace(config=SimpleNamespace(max_positions=512))
    monkeypatch.setattr(Encoders, "_original", original)
    monkeypatch.setattr(Seq2Seq, "_identity", t5[0]["teacher"])
    # speeds are those of a number of threads
    threads = next(s["threads"] for s in found if "threads" in s)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    return plan


def test_the_kept_page_is_what_its_cells_say(plan: Plan, tmp_path: Path) -> None:
    tables = sorted((TABLES[name](plan) for name in TABLES.names()), key=lambda table: table.place)
    cache = Cache(plan.out)
    listed = [(cell, cache.get(cell)) for table in tables for cell in table.listed]
    done = [(cell, result) for cell, result in listed if result is not None]
    # every kept cell has its place
    assert {cell.key for cell, _ in done} == set(records("paper"))
    page = tmp_path / "paper.md"
    write_page(plan, page, tables, Results(done), {})
    assert _without_machine(page) == _without_machine(KEPT / "paper.md")
    drawn, kept = (
        {p.name: p.read_text() for p in (folder / "paper").glob("*.svg")}
        for folder in (tmp_path, KEPT)
    )
    assert drawn == kept


def _without_machine(page: Path) -> str:
    return re.sub(r"^Machine: .*? Teacher:", "Teacher:", page.read_text(), flags=re.M)
