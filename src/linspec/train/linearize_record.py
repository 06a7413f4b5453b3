"""Where a linearization may write, and the files that say what was done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import resolve
from linspec.train.loop import log_lines, mean_loss
from linspec.utils.border import read_json
from linspec.utils.format_version import check_format, stamped
from linspec.utils.places import Place, as_path

RECORD = "linearize.json"


def output_place(
    out: str | Path, source: str | Path, data: Sequence[str | Path], overwrite: bool
) -> Place:
    """Where a linearization of `source` may write."""
    inputs = (resolve(source),)
    return Place(as_path(out), "linearize", inputs=inputs, holders=data, overwrite=overwrite)


def read_record(folder: Path) -> dict[str, Any]:
    """What linearize.json of a model directory says; raises CheckpointError for a newer or unsound one."""
    data = read_json(folder / RECORD)
    check_format(data, folder / RECORD)
    return data


def record_files(
    recipe: Mapping[str, Any],
    plan: dict[str, Any],
    logs: dict[str, list[dict[str, float]]],
    size: int,
    **facts: Any,
) -> dict[str, str]:
    """The files that say what was done: linearize.json, with further facts, and log.jsonl.

    recipe: what was asked for, as JSON. plan: what a run that is resumed must have been asked for; the
    recipe as it was completed.
    """
    done = {
        "recipe": dict(recipe),
        "plan": plan,
        "parameters": size,
        "tokens": {stage: log[-1]["tokens"] for stage, log in logs.items()},
        "seconds": {stage: log[-1]["seconds"] for stage, log in logs.items()},
        "losses": {stage: round(mean_loss(log), 5) for stage, log in logs.items()},
        **facts,
    }
    lines: list[dict[str, float | str]] = [
        {"stage": stage, **entry} for stage, log in logs.items() for entry in log
    ]
    text = json.dumps(stamped(done), indent=2) + "\n"
    return {RECORD: text, "log.jsonl": log_lines(lines)}
