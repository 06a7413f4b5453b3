"""`python -m studies.linearized_llm` as scripts see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import model_dir
from typer.testing import CliRunner, Result

from studies.linearized_llm.__main__ import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def fails(*args: object) -> str:
    found = run(*args)
    assert found.exit_code == 1 and found.stdout == "", found.output
    assert found.stderr.count("\n") == 1 and found.stderr.startswith("error: ")
    return found.stderr


def test_a_table_is_measured_once_and_written(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("abcd end 1 the end\n" * 120)
    args = ("--table", "latency", "--size", "tiny", "--teacher", model_dir("softmax"))
    args = (*args, "--data", data, "--out", tmp_path / "out", "--page", tmp_path / "page.md")
    found = json.loads(run(*args, "--json").stdout)
    keys = {"out", "page", "size", "seeds", "measured", "remaining", "seconds", "tables"}
    assert keys == set(found)
    assert found["measured"] == 2 and found["remaining"] == 0
    table = found["tables"]["latency"]
    assert set(table) == {"done", "total", "rows", "undefined"}
    assert json.loads(run(*args, "--json").stdout)["tables"] == found["tables"]
    page = (tmp_path / "page.md").read_text()
    assert "## Latency and memory" in page
    assert "python -m studies.linearized_llm --table latency --size tiny" in page
    assert "0 cells measured" in run(*args).stderr
    assert "unknown table" in fails(*args, "--table", "nothing")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--budget", "nan"), "--budget must be finite and above 0, got nan"),
        (("--budget", "inf"), "--budget must be finite and above 0, got inf"),
        (("--budget", "-1"), "--budget must be finite and above 0, got -1.0"),
        (
            ("--recall-share", "nan"),
            "--recall-share must be finite and 0 or more and at most 1, got nan",
        ),
        (("--recall-share", "2"), "at most 1, got 2.0"),
        (("--seeds", "0"), "--seeds must be 1 or more, got 0"),
        (("--tokens", "-5"), "tokens must be 1 or more, got -5"),
        (("--size", "huge"), "unknown size huge; known: default, small, tiny"),
        (("--data", ""), "--data: a data source has no name"),
        (("--out", ""), "--out is the present folder"),
        (("--teacher", ""), "--teacher is empty"),
        (("--page", ""), "--page . is a folder"),
        (("--encoder", "/nowhere"), "/nowhere is not a directory"),
    ],
)
def test_a_study_with_a_senseless_option_ends_at_once(
    args: tuple[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in fails(*args)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.crossed(3)
@pytest.mark.parametrize(
    "module", ["studies.linearized_llm", "benchmarks.peers", "benchmarks.against_transformers"]
)
def test_help_names_the_command_that_was_typed(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"Usage: python -m {module} [OPTIONS]" in done.stdout
    assert f"Example: python -m {module} --" in done.stdout
