"""Finished cells on disk, one JSON file each; and the folders in which cells work.

OUT/cells/KEY.json     a finished cell, written aside and renamed: whole or not there
OUT/models/KEY/        a cell under way, or what later cells reuse of it
OUT/teachers/NAME/     a teacher that is trained for the study, for many cells
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linspec.errors import CheckpointError
from linspec.evaluate.study.table import Cell, Result
from linspec.files import exclusive, replace_text


@contextlib.contextmanager
def shared_teacher(out: Path, name: str) -> Iterator[Path]:
    """The folder of a teacher of several cells: one process trains it, the others wait for it."""
    with exclusive(out / "teachers" / ".turns" / name, wait=True):
        yield out / "teachers" / name


def workplace(out: Path, cell: Cell) -> Path:
    """The folder that `cell` works in, and leaves its model in."""
    return out / "models" / cell.key


class Cache:
    """The finished cells of one study folder. Several processes may fill one folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "cells").mkdir(parents=True, exist_ok=True)

    def _path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.key}.json"

    def get(self, cell: Cell) -> Result | None:
        """The result of a finished cell; None when it is not finished or its file is damaged."""
        record = _read(self._path(cell))
        return None if record is None else record.get("result")

    def put(self, cell: Cell, result: Result, seconds: float, machine: dict[str, Any]) -> None:
        """Keep a finished cell with the machine it was measured on."""
        record = {
            "cell": {"table": cell.table, "row": cell.row, "column": cell.column},
            "kind": cell.kind,
            "seed": cell.seed,
            "settings": cell.settings,
            "result": result,
            "seconds": round(seconds, 1),
            "machine": machine,
        }
        replace_text(self._path(cell), json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def seconds(self, kind: str) -> float | None:
        """Median seconds of the finished cells of a kind; None when there are none."""
        records = map(_read, (self.out / "cells").glob(f"{kind}-*.json"))
        found = [record["seconds"] for record in records if record is not None]
        return statistics.median(found) if found else None

    @contextlib.contextmanager
    def claim(self, cell: Cell) -> Iterator[Path | None]:
        """Yield the folder of `cell` for this process alone, None if another one is at it."""
        folder = workplace(self.out, cell)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(folder))
            except CheckpointError:
                yield None
                return
            yield folder


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    # a cell that was written by hand or cut short is measured again
    sound = isinstance(record, dict) and isinstance(record.get("seconds"), int | float)
    return record if sound and "result" in record else None
