"""A batch against a model that takes its time, for tests that kill it: batch_writer.py IN OUT."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from linspec.cli.console import guarded
from linspec.serve.batch import Reply, open_batch

SECONDS = 0.004


async def ask(url: str, body: Mapping[str, Any]) -> Reply:
    """The prompt, twice."""
    await asyncio.sleep(SECONDS)
    choice = {"text": body["prompt"] * 2, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    return Reply(200, {"choices": [choice], "usage": usage}, "req")


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    with open_batch(source, target, "m") as batch:
        print("begun", flush=True)
        asyncio.run(batch.run(ask, at_once=3))


if __name__ == "__main__":
    # a shell starts what runs in its background without it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        guarded("give the same command again to go on")(main)()
    except typer.Exit as end:
        sys.exit(end.exit_code)
