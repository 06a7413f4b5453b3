"""A model can be loaded at every moment, whenever the process that replaces it is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_writer import save

from linspec.checkpoints.hub import load_model
from linspec.utils.files import is_leftover

# a busy machine may hit no writer in the middle of a model: then this many times as many are killed
PATIENCE = 10


def kill_writers(out: Path, mode: str, kills: int) -> tuple[int, int]:
    """Kill writers of `out` at random moments and load after each; returns (models seen, leftovers).

    At least `kills`, and more until models were replaced meanwhile and a writer was hit in one.
    """
    rng, seen, left = random.Random(0), set(), 0
    script = str(Path(__file__).with_name("kill_writer.py"))
    with subprocess.Popen(
        [sys.executable, script, str(out), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for done in range(PATIENCE * kills):
            if done >= kills and len(seen) > 1 and left > 0:
                break
            print(file=process.stdin, flush=True)
            writer, seconds = process.stdout.readline().split()
            time.sleep(rng.uniform(0, 3) * float(seconds))
            os.kill(int(writer), signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            left += sum(is_leftover(path.name) for path in out.parent.iterdir())
            # a whole model: every weight and the text beside it have one number
            values = {float(v) for w in load_model(out).parameters() for v in w.flatten().tolist()}
            assert values == {float((out / "number.txt").read_text())}
            seen |= values
        process.stdin.close()
    return len(seen), left


@pytest.mark.parametrize("mode", ["exchange", "two renames"])
@pytest.mark.parametrize(
    "kills", [8, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_kill_while_publishing_over_a_model_left_no_model_to_load(
    tmp_path: Path, mode: str, kills: int
) -> None:
    out = tmp_path / "model"
    seen, left = kill_writers(out, mode, kills)
    # the kills hit: models were replaced meanwhile, and some writers were in the middle of one
    assert seen > 1 and left > 0
    save(1, out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not any(is_leftover(path.name) or path.name == ".lock" for path in out.iterdir())
