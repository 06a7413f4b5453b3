"""The output of a batch: a file that only grows, by whole lines, each the answer to one line of the input.

A process that is killed leaves at most a torn last line, which the next one cuts off.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from linspec.errors import InputError
from linspec.utils.messages import because

# answers that a loss of power may take, in seconds; a killed process loses none
_SYNCED_EVERY = 1.0


class AnswerFile:
    """Answers at `path`, held by one process.

    done: the id of the input line of each answer that is there, by its number.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        self.done: dict[int, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise InputError(f"cannot write {because(error)}; choose another place") from error
        try:
            self._begin(overwrite)
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def _begin(self, overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.path} is being written by another linspec process; wait for it, or choose another "
                "file"
            ) from error
        if overwrite:
            os.ftruncate(self._file, 0)
            return
        whole = self._read()
        if whole < os.fstat(self._file).st_size:
            os.ftruncate(self._file, whole)

    def _read(self) -> int:
        """Enter the answers that are there; returns where the last whole line ends."""
        end = 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                self._enter(number, raw)
                end += len(raw)
        return end

    def _enter(self, number: int, raw: bytes) -> None:
        try:
            record = json.loads(raw)
            line, found = record["line"], record["id"]
            sound = type(line) is int and isinstance(found, str) and line not in self.done
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise InputError(
                f"{self.path}, line {number}, is no answer of a batch; choose another file, or replace this "
                "one with --overwrite"
            )
        self.done[line] = found

    def add(self, record: Mapping[str, Any]) -> None:
        """Write an answer. Raises OSError when the disk refuses; what was written before stands."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        self.done[record["line"]] = record["id"]
        if time.monotonic() - self._synced > _SYNCED_EVERY:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)
