"""The threads of a step, among themselves: see pool_shares.c."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from linspec.kernels.cpu import library

HERE, SOURCES = Path(__file__).parent, Path(library.__file__).parent / "csrc"


def who_goes_on(pool: Path, folder: Path) -> list[str]:
    """What pool_shares.c prints with the pool of this source file."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    program = folder / "pool_shares"
    flags = ["-O2", "-std=gnu11", "-pthread", "-Dclock_gettime=told_clock", f"-I{SOURCES}"]
    files = [str(HERE / "pool_shares.c"), str(pool)]
    subprocess.run(["cc", *flags, *files, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def test_a_thread_leaves_for_want_of_a_core_and_not_for_more_work(tmp_path: Path) -> None:
    """Prompts were read by one thread: the other took interruptions, which long phases have, for that."""
    assert who_goes_on(SOURCES / "pool.c", tmp_path) == [
        "busy: 2 of 2 go on",
        "away: 1 of 2 go on",
    ]


def test_a_pool_that_leaves_at_any_interruption_is_seen(tmp_path: Path) -> None:
    text = (SOURCES / "pool.c").read_text()
    assert text.count("lost_ns() > waited / 2") == 1
    (tmp_path / "pool.c").write_text(text.replace("lost_ns() > waited / 2", "lost_ns() > 0"))
    assert who_goes_on(tmp_path / "pool.c", tmp_path)[0] == "busy: 1 of 2 go on"
