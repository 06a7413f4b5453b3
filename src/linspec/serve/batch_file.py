"""The output of a batch: a file that only grows, by whole lines, each the answer to one line of the input.

A process that is killed leaves at most a torn last line, which the next one cuts off. Nothing is cut, and
nothing of an earlier batch is replaced, before there is an answer to write.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from linspec.errors import InputError
from linspec.serve.batch_lines import ID_PREFIX
from linspec.utils.messages import because

# answers that a loss of power may take, in seconds; a killed process loses none
_SYNCED_EVERY = 1.0
# what the text of every answer begins with
_BEGINNING = f'{{"id": "{ID_PREFIX}'.encode()


class AnswerFile:
    """Answers at `path`, held by one process.

    Raises InputError for a link, for what is no regular file, and for a file that no batch wrote, with
    `overwrite` too; that file is left as it is. A file that is new is gone again if an error comes before
    its first answer.

    done: the id of the input line of each answer that is there, by its number.
    makers: what made these answers (see `batch_model.maker_of`), as far as they tell.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        self.done: dict[int, str] = {}
        self.makers: set[str] = set()
        # bytes that stay when the first answer is written
        self._kept = 0
        self._began = False
        self._folders = list[Path]()
        self._new = False
        try:
            _check_kind(path)
            self._folders = _missing(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._opened()
        except OSError as error:
            self._remove_folders()
            raise InputError(f"cannot write {because(error)}; choose another place") from error
        try:
            self._read(overwrite)
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def _opened(self) -> int:
        """The file, which this process alone holds; made if there is none."""
        while True:
            self._new, file = _open(self.path)
            try:
                self._hold(file)
                if _is_at(file, self.path):
                    return file
            except BaseException:
                os.close(file)
                raise
            # who held it has removed it meanwhile
            os.close(file)

    def _hold(self, file: int) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _no_regular_file(self.path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.path} is being written by another linspec process; wait for it, or choose another "
                "file"
            ) from error

    def _read(self, overwrite: bool) -> None:
        """Enter the answers that are there, but for those that are to be replaced."""
        with open(self._file, "rb", closefd=False) as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    self._check_torn(number, raw)
                    return
                record = _record(raw)
                if record is None or record["line"] in self.done:
                    raise self._foreign(number)
                if overwrite:
                    return
                self._enter(record)
                self._kept += len(raw)

    def _check_torn(self, number: int, raw: bytes) -> None:
        """Raise InputError for a last line that is no answer of which the end is missing."""
        begun = raw.startswith(_BEGINNING) or _BEGINNING.startswith(raw)
        if not self.done and not (begun and (_record(raw) is not None or not _is_json(raw))):
            raise self._foreign(number)

    def _foreign(self, number: int) -> InputError:
        return InputError(
            f"{self.path}, line {number}, is no answer of a batch; choose another file, or move this one away"
        )

    def _enter(self, record: Mapping[str, Any]) -> None:
        self.done[record["line"]] = record["id"]
        if isinstance(maker := record.get("made_by"), str):
            self.makers.add(maker)

    def check_maker(self, maker: str) -> None:
        """Raise InputError if answers that are there were made by another model, or with other settings."""
        if others := self.makers - {maker}:
            raise InputError(
                f"{self.path} holds answers that another model made, or other settings (made_by is "
                f"{min(others)}, now {maker}): give the --model, --max-tokens, --quantize, --attention, "
                "--rope-scaling, --kv-cache-dtype, --loop, --verifier and --device that it was begun with, "
                "choose another output, or replace this one with --overwrite"
            )

    def add(self, record: Mapping[str, Any]) -> None:
        """Write an answer; the first one takes the place of a torn line, or of what is to be replaced.

        Raises InputError where `check_maker` does, OSError when the disk refuses; what was written before
        stands.
        """
        if "made_by" in record:
            self.check_maker(record["made_by"])
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        if not self._began:
            os.ftruncate(self._file, self._kept)
            self._began = True
        while line:
            line = line[os.write(self._file, line) :]
        self._enter(record)
        if time.monotonic() - self._synced > _SYNCED_EVERY:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _remove_if_empty(self) -> None:
        """Remove a file that is new and has no answer, with the folders made for it."""
        if self._new and not os.fstat(self._file).st_size and _is_at(self._file, self.path):
            self.path.unlink()
            self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in self._folders:
            # what others put there meanwhile stays, and so does what holds it
            with suppress(OSError):
                folder.rmdir()

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
            if kind is not None:
                self._remove_if_empty()
        finally:
            os.close(self._file)


def _check_kind(path: Path) -> None:
    """Raise InputError for a link, whose target is another's, and for what cannot be written by lines."""
    if path.is_symlink():
        raise InputError(
            f"{path} is a symbolic link to {os.readlink(path)}; name the file itself, or a new one"
        )
    if path.exists() and not path.is_file():
        raise _no_regular_file(path)


def _no_regular_file(path: Path) -> InputError:
    what = "a directory" if path.is_dir() else "no regular file"
    return InputError(f"{path} is {what}; answers go to a file, name a new one")


def _missing(folder: Path) -> list[Path]:
    """`folder` and those that hold it, as far as they do not exist, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _open(path: Path) -> tuple[bool, int]:
    """Whether the file is new, and its descriptor; no link is followed, and no pipe waited for."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with suppress(FileExistsError):
            return True, os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(FileNotFoundError):
            return False, os.open(path, flags)


def _is_at(file: int, path: Path) -> bool:
    """Whether `path` still names an open file."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _record(raw: bytes) -> dict[str, Any] | None:
    """A line as the answer of a batch; None if it is none."""
    try:
        record = json.loads(raw)
        sound = type(record["line"]) is int and record["id"].startswith(ID_PREFIX)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if sound else None


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True
