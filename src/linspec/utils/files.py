"""Writing that loses nothing: write beside the target first, then rename, one writer at a time.

A writer of NAME writes `.NAME.writing-ID` beside it and holds a lock on that. A leftover that nobody
holds belongs to a killed process; the next writer of NAME removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from linspec.errors import CheckpointError

LOCK_FILE = ".lock"
_LEFTOVER = re.compile(r"\.(.+)\.(?:writing|old)-[0-9a-f]{32}")
# of Linux's renameat2
_AT_CWD, _RENAME_EXCHANGE = -100, 2
# how long a reader waits for a writer that is between two renames
_WAITS, _PAUSE = 20, 0.01


@contextlib.contextmanager
def replace_dir(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`; put it in the place of `target` when the block succeeds.

    On any error, Ctrl-C included, the half-written directory is removed and `target` stays as it
    was. Whether `target` may be replaced is decided elsewhere (see `linspec.utils.places`). Raises
    CheckpointError when the disk refuses.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        tidy(target)
        aside, held = _make_aside(target, folder=True)
        try:
            yield aside
            _share(aside)
            _swap(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            os.close(held)


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to; it takes the name `target` when the block succeeds.

    Raises CheckpointError when the disk refuses; `target` then stays as it was.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        tidy(target)
        aside, held = _make_aside(target, folder=False)
        try:
            with open(held, "wb") as file:
                yield file
                file.flush()
                aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)


def replace_text(target: Path, text: str) -> None:
    """Write a text file as `replace_file` does."""
    with replace_file(target) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Inside, what the disk refuses is a CheckpointError about `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"could not write {target}: {reason}. Nothing there was changed; free some space or "
            "choose another place"
        ) from error


def tidy(target: Path) -> None:
    """Remove what killed processes left beside `target`.

    If a process was killed between its two renames, the old file or directory gets its name back.
    """
    for left in _leftovers(target):
        with contextlib.suppress(OSError):
            held = os.open(left, os.O_RDONLY)
            try:
                # a running process holds its own
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(left, target)
            finally:
                os.close(held)


def tidy_all(folder: Path, names: Iterable[str]) -> None:
    """`tidy` for everything in `folder` that some of these names, which are in it, are leftovers of."""
    for target in {found[1] for name in names if (found := _LEFTOVER.fullmatch(name))}:
        tidy(folder / target)


def restored(target: Path) -> Path:
    """`target`, for readers; renamed back if a writer was killed between its two renames."""
    for _ in range(_WAITS):
        if os.path.lexists(target) or not _leftovers(target):
            break
        tidy(target)
        time.sleep(0 if os.path.lexists(target) else _PAUSE)
    return target


def is_leftover(name: str) -> bool:
    """Whether a file of this name belongs to a write that has not finished."""
    return _LEFTOVER.fullmatch(name) is not None


def _leftovers(target: Path) -> list[Path]:
    start = re.escape(f".{target.name}.")
    try:
        names = os.listdir(target.parent)
    except OSError:
        return []
    found = [name for name in names if re.fullmatch(rf"{start}(writing|old)-[0-9a-f]{{32}}", name)]
    return [target.with_name(name) for name in found]


def _clear(left: Path, target: Path) -> None:
    if ".old-" in left.name and not os.path.lexists(target):
        left.rename(target)
    elif left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def _beside(target: Path, state: str) -> Path:
    # containers share file systems and have equal process ids
    return target.with_name(f".{target.name}.{state}-{uuid.uuid4().hex}")


def _make_aside(target: Path, *, folder: bool) -> tuple[Path, int]:
    """A new directory or file beside `target`, and a descriptor that locks it while it is open."""
    while True:
        aside = _beside(target, "writing")
        if folder:
            aside.mkdir()
        # a file is written through this descriptor
        flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
        held = os.open(aside, flags, 0o666)
        _lock(held)
        # `tidy` of another process may have come before the lock
        if aside.exists():
            return aside, held
        os.close(held)


def _lock(held: int) -> None:
    # some network file systems have no locks on directories: nothing is tidied there
    with contextlib.suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_EX)


def _share(folder: Path) -> None:
    """Give files the permissions that new files have here: safetensors writes for the owner alone."""
    usual = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        # hard links to files of others keep theirs
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(usual)


def _swap(new: Path, target: Path) -> None:
    """Give `new` the name `target`; the old content then has the name `new`, or is removed."""
    if not target.exists():
        new.rename(target)
        return
    if _exchange(new, target):
        return
    old, held = _beside(target, "old"), os.open(target, os.O_RDONLY)
    try:
        _lock(held)
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(held)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once; False where the system cannot (only Linux can)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def exclusive(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `directory` for one writer; raises CheckpointError if another process holds it.

    wait: wait until it is free instead. A directory that this call makes and that stays empty is removed.
    """
    with disk_errors(directory):
        made = not directory.exists()
        path = directory / LOCK_FILE
        lock = _hold(directory, wait)
    try:
        yield
    finally:
        # the directory may have been replaced, and another process may hold the new one
        if _is_at(lock, path):
            path.unlink()
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        lock.close()


def _hold(directory: Path, wait: bool) -> IO[str]:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / LOCK_FILE, "w")  # noqa: SIM115 - closed by `exclusive`
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                lock.close()
                raise _in_use(directory) from error
            print(f"waiting for the process that uses {directory}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_at(lock, directory / LOCK_FILE):
            return lock
        # its holder removed it or replaced the directory meanwhile
        lock.close()


def check_unused(directory: Path) -> None:
    """Raise CheckpointError if a process holds `directory`; holds nothing itself."""
    try:
        lock = open(directory / LOCK_FILE)  # noqa: SIM115 - closed below
    except (OSError, ValueError):
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(directory) from error


def _in_use(directory: Path) -> CheckpointError:
    return CheckpointError(
        f"{directory} is in use by another linspec process; wait for it to end, after which --overwrite "
        "(overwrite=True in Python) would replace what it wrote, or choose another --out directory"
    )


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def cache_dir() -> Path:
    """The directory for derived data: $LINSPEC_CACHE, else `linspec` in the user's cache directory."""
    root = os.environ.get("LINSPEC_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "linspec"
