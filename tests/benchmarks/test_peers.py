"""The comparison with other engines: caching, skipping by name, what `--json` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.peers import base, run
from benchmarks.peers.__main__ import app
from benchmarks.peers.base import Format, Peer, Prompts, Session
from benchmarks.peers.cells import Cache, Cell, Plan, Result
from benchmarks.peers.client import QuietMachine, WorkerError
from benchmarks.peers.openvino import steps_of
from benchmarks.peers.own import OwnSession
from benchmarks.peers.page import summary, write_page
from benchmarks.peers.rows import rows_of
from benchmarks.peers.shapes import SHAPES, write_checkpoint
from benchmarks.peers.worker import Worker
from linspec.checkpoints.hub import load_model
from linspec.errors import ConfigError, LinspecError


class FakeSession(Session):
    def open(self, prompts: Prompts) -> float:
        return 0.5

    def decode(self, tokens: int) -> list[float]:
        return [0.01] * tokens


class FakePeer(Peer):
    name = "fake"
    packages = ()
    formats = (Format(name="int8", bits=8, weight_bytes=1, cache_bytes=1),)

    def convert(self, source: Path, target: Path, form: Format) -> None:
        (target / "made").touch()

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        assert (folder / "made").exists()
        return FakeSession()


class InProcess:
    """A client whose worker is in this process: torch is imported once."""

    started = 0

    def __init__(self, python: str, threads: int, log: Path) -> None:
        type(self).started += 1
        self.worker = Worker()

    def ask(self, operation: str, **arguments: object) -> object:
        try:
            return json.loads(json.dumps(getattr(self.worker, operation)(**arguments)))
        except Exception as error:
            raise WorkerError(str(error)) from error

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # the toy's matrices fill no memory: what is read is of no interest here
    monkeypatch.setattr(run, "read_bandwidth", lambda: 10.0)
    monkeypatch.setattr(run, "worker", InProcess)
    monkeypatch.setattr(run, "_REST", 0.0)
    real = base.peer
    found = {"fake": FakePeer(), "gone": FakePeer()}
    found["gone"].packages = ("no_such_package",)
    for module in ("base", "run", "worker", "cells"):
        place = f"benchmarks.peers.{module}.peer"
        monkeypatch.setattr(place, lambda name: found.get(name) or real(name))
    monkeypatch.setitem(base.MODULES, "fake", "fake")
    monkeypatch.setitem(base.MODULES, "gone", "gone")


def toy_plan(out: Path, *peers: str, accept: tuple[float, ...] = ()) -> Plan:
    return Plan(
        out=out, peers=peers, shapes=("toy",), contexts=(16,), tokens=3, rounds=2, accept=accept
    )


def test_cells_are_kept_and_peers_left_out_by_name(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, "linspec", "fake", "gone", accept=(0.0, 1.0))
    skipped = run.compare(plan)
    assert skipped == {"gone": "no_such_package not installed (linspec[peers])"}
    found = {row.engine: row for row in rows_of(plan)}
    assert set(found) == {
        *(f"linspec {form}" for form in ("float32", "int8", "int8-kv8", "int4", "int4-kv8")),
        "fake int8",
    }
    assert found["fake int8"].tokens_per_s == pytest.approx(100)
    assert found["fake int8"].prefill_tokens_per_s == pytest.approx(32)
    read = SHAPES["toy"].read_parameters + 16 * SHAPES["toy"].cache_numbers
    assert found["fake int8"].limit == pytest.approx(read / 0.01 / 1e10)
    assert found["linspec int8"].nodes[1] == 1
    assert set(found["linspec int8"].accepted) == {0.0, 1.0}
    before = InProcess.started
    run.compare(plan)
    # one question per peer whether it is there, nothing else
    assert InProcess.started == before + 3


def test_page_and_json(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, "fake")
    run.compare(plan)
    text = write_page(plan, {"gone": "not installed"}).read_text()
    assert "| toy | 16 | 1 | 8 | fake int8 | 100 |" in text
    assert "- gone: not installed" in text
    assert (tmp_path / "cpu" / "toy-at-8-bits.svg").exists()
    data = json.loads(json.dumps(summary(plan, {})))
    assert data["rows"][0]["engine"] == "fake int8" and data["ratios"] == []


def test_cells_of_an_older_folder_load(tmp_path: Path) -> None:
    plan, cache = toy_plan(tmp_path, "fake"), Cache(tmp_path)
    cell = Cell(shape="toy", context=16, batch=1, peer="fake", form="int8")
    result = Result(step_s=[[0.01]], bandwidth_gb_s=[10.0])
    # as 0.1.0 wrote it: without a format
    record = {"cell": asdict(cell), "result": asdict(result)}
    (tmp_path / "cells" / f"{cell.key}.json").write_text(json.dumps(record, indent=1) + "\n")
    assert cache.has(cell) and cache.all() == {cell: result}
    before = InProcess.started
    run.compare(plan)
    assert InProcess.started == before + 1
    assert len(rows_of(plan)) == 1


def test_a_failed_cell_is_named_and_tried_again(tmp_path: Path) -> None:
    plan, cache = toy_plan(tmp_path, "fake"), Cache(tmp_path)
    cell = Cell(shape="toy", context=16, batch=1, peer="fake", form="int8")
    cache.put(cell, Result(error="too hot"))
    assert not cache.has(cell) and rows_of(plan) == []
    assert summary(plan, {})["failed"] == {cell.key: "too hot"}
    run.compare(plan)
    assert cache.has(cell)


def test_reading_in_chunks_leads_to_the_same_tokens(tmp_path: Path) -> None:
    folder = write_checkpoint(SHAPES["toy"], tmp_path)
    assert write_checkpoint(SHAPES["toy"], tmp_path) == folder
    session = OwnSession(load_model(folder).to_inference())
    prompts = [[5 + i % 9 for i in range(40)], [7 + i % 5 for i in range(40)]]
    session.open(prompts)
    alone = load_model(folder)
    expected = [int(alone(torch.tensor([prompt]))[0, -1].argmax()) for prompt in prompts]
    assert session.tokens == expected
    assert len(session.decode(3)) == 3 and session.state.length(1) == 43
    session.rows(4, 2)
    assert session.state.length(0) == 43
    tokens, _ = session.accept(4, 1.0, 2)
    assert tokens == 8 and session.state.length(0) == 51


def test_bad_plans(tmp_path: Path) -> None:
    for wrong in ({"peers": ("nobody",)}, {"shapes": ("9z",)}, {"accept": (2.0,)}, {"rounds": 0}):
        with pytest.raises(ConfigError):
            Plan(out=tmp_path, **wrong)  # type: ignore[arg-type]  # of different types


def test_guard_runs_while_the_block_does(tmp_path: Path) -> None:
    with QuietMachine("env") as quiet:
        first = quiet.waiting
        quiet.breathe()
        assert quiet.waiting is first
        quiet.began -= 1000
        quiet.breathe()
        assert first is not None and first.returncode == 0 and quiet.waiting is not first
    with pytest.raises(LinspecError, match="did not run"), QuietMachine("true"):
        pass


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--peers", "nobody"), "unknown peer nobody; known: linspec"),
        (("--python", "nobody=x"), "unknown peer nobody"),
        (("--python", "x"), "takes PEER=PATH"),
        (("--formats", "int3"), "unknown format int3; known: float32"),
        (("--contexts", ""), "contexts must name at least one number"),
        (("--accept", "nan"), "--accept must be from 0 to 1, got nan"),
        (("--tokens", "1"), "tokens must be 2 or more, got 1"),
        (("--rounds", "0"), "rounds must be 1 or more, got 0"),
        (("--out", ""), "--out is the present folder"),
    ],
)
def test_a_comparison_with_a_senseless_option_ends_at_once(
    args: tuple[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 1 and found.output.count("\n") == 1
    assert told in found.output
    assert not list(tmp_path.iterdir())


def test_a_step_of_several_rows_lasts_as_long_as_its_tokens_together() -> None:
    assert steps_of([2.0, 2.0, 3.0, 3.0], 2) == pytest.approx([4e-6, 6e-6])
    assert steps_of([2.0, 3.0], 1) == pytest.approx([2e-6, 3e-6])
