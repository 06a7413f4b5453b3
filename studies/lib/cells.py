"""Finished cells on disk: OUT/cells/KEY.json holds the record of one measurement.

A record is written aside and renamed: it is whole or not there. Several processes may fill one folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linspec.utils.files import replace_text
from linspec.utils.format_version import check_format, stamped

Record = dict[str, Any]


class Cells:
    """The records of one folder, by key."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> Record | None:
        """One record; None when it is not there or damaged. Raises CheckpointError for a newer format."""
        return _read(self.folder / f"{key}.json")

    def write(self, key: str, record: Record) -> None:
        """Keep a record."""
        text = json.dumps(stamped(record), indent=1, ensure_ascii=False)
        replace_text(self.folder / f"{key}.json", text + "\n")

    def all(self, prefix: str = "") -> Iterator[Record]:
        """Every sound record whose key begins with `prefix`, in the order of the keys."""
        for path in sorted(self.folder.glob(f"{prefix}*.json")):
            record = _read(path)
            if record is not None:
                yield record


def _read(path: Path) -> Record | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    check_format(record, path)
    return record
