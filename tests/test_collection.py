"""Collection gives the same tests in every process: `pytest -n` refuses to run otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# files with parameters of every kind: directories made for the tests, sets, bytes, long texts, objects
FILES = (
    "test_borders.py",
    "test_hostile_arguments.py",
    "test_llm.py",
    "test_registry.py",
    "checkpoints/test_gguf_reader.py",
    "models/test_tokenizer.py",
    "mixers/test_forms.py",
)
# two parameters of 80 characters each and the name of a test
LONGEST = 300


def collect(hash_seed: str, scratch: Path) -> subprocess.Popen[str]:
    """Start a collection with its own hashes of strings and its own place for temporary files."""
    scratch.mkdir()
    own = {"PYTHONHASHSEED": hash_seed, "TMPDIR": str(scratch)}
    others = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ("--collect-only", "-o", "addopts=-q", "-p", "no:cacheprovider")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *FILES],
        cwd=TESTS,
        env=others | own,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_ids_held_a_random_path_and_bytes_of_a_file(tmp_path: Path) -> None:
    started = [collect(seed, tmp_path / seed) for seed in ("1", "2")]
    outputs = [process.communicate()[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    first, second = ([line for line in lines if "::" in line] for lines in outputs)
    assert first == second
    assert len(first) > 100 and len(set(first)) == len(first)
    for name in first:
        assert len(name) <= LONGEST and name.isascii() and str(tmp_path) not in name
