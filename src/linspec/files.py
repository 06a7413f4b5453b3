"""Writing that loses nothing: aside first, then renamed, one writer at a time."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from linspec.errors import CheckpointError
from linspec.messages import because

# of Linux's renameat2
_AT_CWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replace_dir(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`; rename it over `target` when the block succeeds.

    On any error, Ctrl-C included, the half-written directory is removed and `target` stays as it
    was. Raises CheckpointError when the disk refuses.
    """
    target = Path(target)
    aside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        _share(aside)
        _swap(aside, target)
    except OSError as error:
        raise CheckpointError(
            f"could not write {target}: {because(error)}. Nothing there was changed"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give files the permissions that new files have here: safetensors writes for the owner alone."""
    usual = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(usual)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    if _exchange(new, target):
        return
    # a process killed between the two renames leaves what was there as .NAME.old-PID
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once; False where the system cannot (only Linux can)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def replace_text(target: Path, text: str) -> None:
    """Write a text file aside, then rename it over `target`."""
    aside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {because(error)}") from error
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `directory` for one writer; raises CheckpointError if another process holds it.

    wait: until it is free, instead.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not wait:
                raise CheckpointError(
                    f"{directory} is in use by another linspec process; wait for it to end or choose "
                    "another --out directory"
                ) from error
            print(f"waiting for the process that uses {directory}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_dir() -> Path:
    """Where derived data is kept between runs: $LINSPEC_CACHE, else the user's cache directory."""
    root = os.environ.get("LINSPEC_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "linspec"
