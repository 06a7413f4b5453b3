"""Where linspec may write, decided before any work: it overwrites and removes nothing of others.

A place for a directory is new, is empty, or holds what the same command wrote before. linspec replaces
the last only if the caller asks for it, and refuses everything else by name. `linspec.json` in a
directory says which command wrote it, and which files.

    place = Place(out, "quantize", inputs=(model,))
    place.check()
    with place.held(), place.replaced() as folder:
        ...
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from linspec.errors import CheckpointError, ConfigError, WrongType
from linspec.utils.files import (
    LOCK_FILE,
    check_unused,
    exclusive,
    is_leftover,
    replace_dir,
    replace_file,
    replace_text,
    tidy,
)

MARK = "linspec.json"
# of a run under way, inside its output
TRAINING = "training"
# what linspec 0.1 wrote, which left no mark: the record of a command, and the names of its files
_OLD_RECORDS = {"linearize.json": "linearize", "drafter.json": "train-drafter"}
_OLD_FILES = (
    *_OLD_RECORDS,
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "drafter.safetensors",
    "log.jsonl",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
_SHOWN = 3
_OTHER = "choose another place (--out)"


def as_path(out: object) -> Path:
    """The path that a caller gave for an output; raises WrongType if it is no path."""
    if isinstance(out, str | os.PathLike):
        return Path(out)
    raise WrongType(f"an output is a text or a path, got {out!r}; name a new directory")


@dataclass(frozen=True)
class Place:
    """A directory that one command writes as a whole.

    kind: the command. inputs: what it reads; the place may not be one of them, hold one or lie in one.
    holders: inputs in which the place may lie all the same. overwrite: replace what the same
    command wrote before. beside: files of others may be there, and stay. elsewhere: how to write at another
    place, for messages.
    """

    path: Path
    kind: str
    inputs: Sequence[str | Path] = ()
    holders: Sequence[str | Path] = ()
    overwrite: bool = False
    beside: bool = False
    elsewhere: str = _OTHER

    def __post_init__(self) -> None:
        path = Path(self.path)
        # `.` and `x/..` have no name of their own to write beside
        object.__setattr__(self, "path", path if path.name not in ("", "..") else path.resolve())

    def check(self, *, resume: bool = False) -> None:
        """Raise ConfigError if the place may not be written; touches nothing.

        resume: continue the run that is under way there; files that others added since then stay. Raises
        CheckpointError if another process writes there.
        """
        # first: what it holds at this moment would be called an unfinished run
        check_unused(self.path)
        self._check(resume)

    def _check(self, resume: bool) -> None:
        _check_name(self.path)
        self._check_inputs()
        if self.path.exists():
            self._check_content(resume)

    @contextlib.contextmanager
    def held(self, *, resume: bool = False) -> Iterator[None]:
        """Hold the place for this process, checked once more and free of leftovers.

        Raises ConfigError like `check`, and CheckpointError if another process holds it.
        """
        self.check(resume=resume)
        with exclusive(self.path):
            self._check(resume)
            tidy(self.path)
            if self.overwrite and not resume and _made_here(self.path):
                _tell_overwriting(self.path, self.kind)
            yield

    @contextlib.contextmanager
    def replaced(self) -> Iterator[Path]:
        """Yield an empty directory that becomes the place when the block succeeds.

        The old files of linspec are removed, files of others stay. Raises CheckpointError if the disk
        refuses, or if a file of others has the name of a new file.
        """
        with replace_dir(self.path) as aside:
            yield aside
            written = sorted(_content(aside))
            mark = {"format": 1, "kind": self.kind, "files": [*written, MARK]}
            (aside / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
            self._keep_strangers(aside, {*written, MARK})

    def _check_inputs(self) -> None:
        out = self.path.resolve()
        for given in (*self.inputs, *self.holders):
            source = Path(given).resolve()
            if not source.exists():
                continue
            if out == source:
                raise ConfigError(
                    f"{self.path} is itself an input of this command; {self.elsewhere}"
                )
            if out in source.parents:
                raise ConfigError(
                    f"{self.path} holds {given}, an input of this command; {self.elsewhere}"
                )
            if source in out.parents and given in self.inputs:
                raise ConfigError(
                    f"{self.path} lies inside {given}, an input of this command; {self.elsewhere}"
                )

    def _check_content(self, resume: bool) -> None:
        mark, under_way = read_mark(self.path), _run_under_way(self.path)
        files = set(_content(self.path))
        if under_way is not None and under_way.get("kind", self.kind) != self.kind:
            raise ConfigError(
                f"{self.path} holds an unfinished run of {_by(under_way['kind'])}; {self.elsewhere}"
            )
        if files and mark is not None and mark.kind != self.kind:
            raise ConfigError(
                f"{self.path} was written by {_by(mark.kind)}, and {_by(self.kind)} would not make "
                f"it again; {self.elsewhere}"
            )
        strange = files - (mark.files if mark else set())
        if resume or self.beside:
            return
        if strange:
            raise ConfigError(
                f"{self.path} holds files that {_by(self.kind)} did not write: {_some(strange)}; "
                f"move them away or {self.elsewhere}"
            )
        if under_way is not None and not self.overwrite:
            raise ConfigError(
                f"{self.path} holds an unfinished run; give the same command with --resume to continue "
                f"it or with --overwrite (overwrite=True in Python) to start again, or {self.elsewhere}"
            )
        if files and not self.overwrite:
            raise ConfigError(
                f"{self.path} was written by {_by(self.kind)} before; give --overwrite (overwrite=True "
                f"in Python) to replace it, or {self.elsewhere}"
            )

    def _keep_strangers(self, aside: Path, written: set[str]) -> None:
        """Link the files of others into the new directory, so that they are not lost."""
        if not self.path.is_dir():
            return
        mark = read_mark(self.path)
        for name in sorted(set(_content(self.path)) - (mark.files if mark else set())):
            if name in written:
                raise CheckpointError(
                    f"{self.path / name} was not written by linspec and is in the way; move it and "
                    "give the same command again (with --resume where a run was under way)"
                )
            _link(self.path / name, aside / name)


@dataclass(frozen=True)
class Mark:
    """Who wrote a directory: the command and its files, as paths from there."""

    kind: str
    files: set[str]


def read_mark(folder: Path) -> Mark | None:
    """The mark of a directory that linspec wrote; None for any other."""
    data = _read(folder / MARK)
    files = data.get("files")
    if isinstance(files, list) and data.get("kind"):
        return Mark(str(data["kind"]), {str(name) for name in files})
    kind = next((kind for name, kind in _OLD_RECORDS.items() if (folder / name).exists()), None)
    if kind is None and isinstance(_read(folder / "config.json").get("quantization"), dict):
        kind = "quantize"
    if kind is None:
        return None
    known = {n for n in _content(folder) if any(fnmatch(n, each) for each in _OLD_FILES)}
    return Mark(kind, known)


def mark_folder(folder: Path, kind: str) -> None:
    """Write the mark of a folder that `kind` fills step by step, if there is none yet."""
    if _read(folder / MARK).get("kind") != kind:
        replace_text(folder / MARK, json.dumps({"format": 1, "kind": kind}) + "\n")


def check_workspace(
    out: Path, kind: str, signs: Sequence[str], inputs: Sequence[str | Path] = ()
) -> None:
    """Raise ConfigError for a folder of others; `kind` fills its own step by step, and never replaces it.

    signs: patterns of files that show that `kind` began the folder before there were marks.
    """
    _check_kind(out)
    Place(out, kind, holders=inputs)._check_inputs()
    data = _read(out / MARK) if out.is_dir() else {}
    ours = data.get("kind") == kind or (not data and any(any(out.glob(each)) for each in signs))
    if not ours and out.is_dir() and any(_content(out)):
        raise ConfigError(
            f"{out} holds files that {_by(kind)} did not write: {_some(set(_content(out)))}; {_OTHER}"
        )


@dataclass(frozen=True)
class FilePlace:
    """A file that one command writes as a whole.

    ours: whether the same command wrote the file that is there. The rest is as in `Place`.
    """

    path: Path
    kind: str
    ours: Callable[[Path], bool]
    inputs: Sequence[str | Path] = ()
    overwrite: bool = False

    def check(self) -> None:
        """Raise ConfigError if the file may not be written; touches nothing."""
        path = self.path
        if path.is_symlink() or path.is_dir():
            raise ConfigError(f"{path} is {_what(path)}; name a file that is new")
        _check_parents(path)
        Place(path, self.kind, inputs=self.inputs)._check_inputs()
        if not path.exists():
            return
        if not self.ours(path):
            raise ConfigError(
                f"{path} was not written by {_by(self.kind)}; move it or name another file"
            )
        if not self.overwrite:
            raise ConfigError(
                f"{path} was written by {_by(self.kind)} before; give --overwrite (overwrite=True in "
                "Python) to replace it, or name another file"
            )

    @contextlib.contextmanager
    def replaced(self) -> Iterator[IO[bytes]]:
        """Yield an open file that becomes the place when the block succeeds; on any error nothing changes."""
        self.check()
        if self.path.exists():
            _tell_overwriting(self.path, self.kind)
        with replace_file(self.path) as file:
            yield file
            # another process may have written there meanwhile
            self.check()


def _tell_overwriting(path: Path, kind: str) -> None:
    told = f"overwriting {path}, which {_by(kind)} wrote; it stays until the new one is whole"
    print(told, file=sys.stderr, flush=True)


def check_text(path: Path, signs: Sequence[str]) -> None:
    """Raise ConfigError unless a text can be written to `path`: a new file or one of linspec's own.

    signs: every text that the command writes has one of them at its beginning.
    """
    if path.is_symlink() or path.is_dir():
        raise ConfigError(f"{path} is {_what(path)}; name a file that is new")
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(2000)
    if not any(sign in start for sign in signs):
        raise ConfigError(f"{path} was not written by this command; move it or name another file")


def _check_kind(path: Path) -> None:
    """Raise ConfigError for a path that exists and is no directory, or is a link."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{path} is {_what(path)}, not a directory; {_OTHER}")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    """Raise ConfigError for a path that cannot be made because a file is in the way."""
    parent = next((each for each in path.absolute().parents if each.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ConfigError(f"{parent} is {_what(parent)}, so {path} cannot be made; {_OTHER}")


def _check_name(path: Path) -> None:
    """Raise ConfigError for a place that cannot be replaced as a whole."""
    _check_kind(path)
    out = path.resolve()
    if out == Path.cwd() or out in Path.cwd().parents:
        raise ConfigError(
            f"{str(path)!r} is the directory that this command runs in, or holds it; name a "
            "directory of its own (--out)"
        )
    if path.is_dir() and os.path.ismount(path):
        raise ConfigError(f"{path} is a mount point; name a directory inside it (--out)")


def _what(path: Path) -> str:
    if path.is_symlink():
        return f"a symbolic link to {os.readlink(path)}"
    return "a directory" if path.is_dir() else "a file"


def _by(kind: str) -> str:
    """The command as a user types it: a module of a clone, a function, or a verb."""
    if "." in kind:
        return f"`python -m {kind}`"
    return f"`{kind}`" if "_" in kind else f"`linspec {kind}`"


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _content(folder: Path) -> Iterator[str]:
    """Files, links and empty directories under `folder`, but for those of a run that is under way."""
    for root, folders, files in os.walk(folder):
        at = Path(root)
        folders[:] = [name for name in folders if not is_leftover(name)]
        if at == folder:
            files = [name for name in files if name != LOCK_FILE]
            if _run_under_way(folder) is not None:
                folders.remove(TRAINING)
        linked = [name for name in folders if (at / name).is_symlink()]
        if at != folder and not folders and not files:
            yield at.relative_to(folder).as_posix()
        for name in (*files, *linked):
            if not is_leftover(name):
                yield (at / name).relative_to(folder).as_posix()


def _run_under_way(out: Path) -> dict[str, Any] | None:
    """The mark of the unfinished run in `out`, {} for one of linspec 0.1; None without a run."""
    folder = out / TRAINING
    if folder.is_symlink() or not folder.is_dir():
        return None
    mark = _read(folder / MARK)
    old = (folder / "plan.json").exists() or (folder / "state.json").exists()
    return mark if mark or old else None


def _made_here(out: Path) -> bool:
    return read_mark(out) is not None or _run_under_way(out) is not None


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
