"""Batches on Ray Data: every line is answered once, also where an actor is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from api_server import talker
from typer.testing import CliRunner

from linspec.cli import app
from linspec.serve.batch import open_batch
from linspec.serve.batch_model import answer_with

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed"),
    pytest.mark.filterwarnings("default"),
]


def write(path: Path, count: int) -> Path:
    lines: list[Any] = [
        {"prompt": f"{n} def f(", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        for n in range(count)
    ]
    lines[3] = {"text": "asks for nothing"}
    lines[4] = {"prompt": "x", "temperature": -1}
    lines[5] = {
        "custom_id": "a",
        "url": "/v1/completions",
        "body": {"prompt": "x", "max_tokens": 3},
    }
    lines[5]["body"]["temperature"] = 0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(path: Path) -> dict[int, dict[str, Any]]:
    """The answers by line, without what differs from run to run; no line has two."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    for each in read:
        each.pop("usage", None)
        if each.get("response"):
            each["response"] = each["response"]["body"]["choices"][0]["text"]
    found = {each["line"]: each for each in read}
    assert len(found) == len(read)
    return found


def kill_one(done: threading.Event, killed: list[int], target: Path) -> None:
    """Kill an actor of this process, as soon as some answers are there."""
    while not done.is_set() and (not target.exists() or target.stat().st_size < 4000):
        time.sleep(0.02)
    # Ray's own processes are children of this one
    for each in psutil.Process().children(recursive=True):
        if any("MapWorker" in part for part in each.cmdline()):
            killed.append(each.pid)
            os.kill(each.pid, signal.SIGKILL)
            return


def test_an_actor_is_killed_and_every_line_is_answered_once(tmp_path: Path) -> None:
    from linspec.serve.ray_batch import answer_on_ray

    source = write(tmp_path / "in.jsonl", 120)
    with open_batch(source, tmp_path / "plain", "m") as batch:
        answer_with(batch, str(talker()), max_batch=2)
    target, done, killed = tmp_path / "out", threading.Event(), list[int]()
    killer = threading.Thread(target=kill_one, args=(done, killed, target))
    killer.start()
    with open_batch(source, target, "m") as batch:
        answer_on_ray(batch, str(talker()), replicas=2, max_batch=2)
        assert batch.left == 0 and batch.summary.failed == 2
    done.set()
    killer.join()
    assert killed
    assert records(target) == records(tmp_path / "plain")
    # half of it is torn off, and answered by the same command
    content = target.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    left = CliRunner().invoke(
        app,
        ["batch", str(source), str(target), "--model", str(talker()), "--name", "m", "--ray"],
    )
    assert left.exit_code == 0, left.output
    assert records(target) == records(tmp_path / "plain")
