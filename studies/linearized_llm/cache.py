"""Finished cells on disk, one JSON file each; and the folders in which cells work.

OUT/cells/KEY.json     a finished cell
OUT/models/KEY/        a cell under way, or what later cells reuse of it
OUT/teachers/NAME/     a teacher that is trained for the study, for many cells
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linspec.errors import CheckpointError
from linspec.utils.files import exclusive
from studies.lib.cells import Cells
from studies.linearized_llm.table import Cell, Result


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
        self.out, self._cells = out, Cells(out)

    def get(self, cell: Cell) -> Result | None:
        """The result of a finished cell; None when it is not finished or its file is damaged."""
        record = self._cells.read(cell.key)
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
        self._cells.write(cell.key, record)

    def seconds(self, kind: str) -> float | None:
        """Median seconds of the finished cells of a kind; None when there are none."""
        found = [record["seconds"] for record in self._cells.all(f"{kind}-")]
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
