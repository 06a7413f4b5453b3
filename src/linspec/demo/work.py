"""The demo's directory: what is done and what it cost, so that a stopped run can go on."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linspec.demo.budget import Clock
from linspec.errors import ConfigError
from linspec.utils.files import replace_text

RECORD = "demo.json"


class Work:
    """Files and record of one demo in `folder`.

    overwrite: a record that was made for another plan is discarded together with its models; without
    it such a folder is refused by ConfigError.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, Any],
        clock: Clock = time.monotonic,
        *,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.clock = folder, clock
        self.student = folder / "student"
        plan = json.loads(json.dumps(plan))
        stored = _read(folder / RECORD)
        self.resumed = stored.get("plan") == plan
        if stored and not self.resumed and not overwrite:
            raise ConfigError(
                f"{folder} holds a demo with other settings or of another linspec; give --overwrite "
                "(overwrite=True in Python) to make it anew, or choose another --out"
            )
        if not self.resumed:
            shutil.rmtree(self.student, ignore_errors=True)
            stored = {"plan": plan, "facts": {}, "seconds": {}}
        self._record = stored
        folder.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        return dict(self._record["seconds"])

    @property
    def spent(self) -> float:
        """Seconds of all phases so far."""
        return sum(self.seconds.values())

    @contextlib.contextmanager
    def phase(self, name: str, *, resumable: bool = False) -> Iterator[None]:
        """Time a phase; that of a resumable one adds to what it took before it was interrupted."""
        before = self.seconds.get(name, 0.0) if resumable else 0.0
        began = self.clock()
        try:
            yield
        finally:
            self.took(name, before + self.clock() - began)

    def took(self, name: str, seconds: float) -> None:
        """Set the seconds of a phase."""
        self._record["seconds"][name] = round(seconds, 2)
        self.save()

    def recall(self, key: str) -> Any:
        """A fact noted by this run or the one before it, else None."""
        return self._record["facts"].get(key)

    def note(self, key: str, value: Any) -> None:
        """Keep a fact (plain JSON types) for the next run."""
        self._record["facts"][key] = value
        self.save()

    def save(self) -> None:
        """Write the record."""
        replace_text(self.folder / RECORD, json.dumps(self._record, indent=2) + "\n")


def can_resume(folder: Path, record: str) -> bool:
    """True when a training run in `folder` was begun or finished."""
    return (folder / "training" / "plan.json").exists() or (folder / record).exists()


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
