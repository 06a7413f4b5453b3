"""States of earlier texts on disk, for what no longer fits into memory and for the next process.

One file holds one text whole (see `prefix_file`). Who may read the files may read the texts, so the directory
is the owner's alone. Files are written by a thread of their own, aside and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import re
import stat
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from linspec.engine.budget import PIECE
from linspec.engine.prefix_file import Kept, pack, read, read_beginning, unpack
from linspec.errors import CheckpointError
from linspec.state.sequence_states import Pages, SequenceStates
from linspec.state.slots import StateSnapshot
from linspec.utils.files import is_leftover, replace_file, tidy_all

_log = logging.getLogger("linspec")
_NAME = re.compile(r"(\d+)-[0-9a-f]{32}\.safetensors")
# texts that wait to be written; more are forgotten, so that a slow disk takes no memory and no time
_WAITING = 8


class PrefixStore:
    """Files of one model in `folder`, at most `limit` bytes of them; key names the model and its caches.

    A file is found by its whole text. Where all that `states` hold grows, it is found by every beginning of a
    multiple of PIECE tokens too, and gives as much as it shares with a prompt.
    """

    def __init__(self, folder: Path, key: str, limit: int, states: SequenceStates) -> None:
        self.folder, self.key, self.limit, self.states = folder / key, key, limit, states
        # bytes of each file, the longest unused first; and files by digests of what they begin with
        self._files: dict[str, int] = {}
        self._index: dict[str, str] = {}
        self._lock = threading.Lock()
        self._queue: queue.Queue[tuple[str, Callable[[], bytes]]] = queue.Queue(_WAITING)
        self._writer: threading.Thread | None = None
        self._failing = False
        self._scan()

    def _scan(self) -> None:
        """Find what earlier processes left, and remove what killed ones were writing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            names = [path.name for path in self.folder.iterdir()]
        except OSError as error:
            raise CheckpointError(
                f"the prefix store {self.folder} cannot be used: {error.strerror}; choose another directory"
            ) from error
        tidy_all(self.folder, names)
        found = []
        for name in names:
            # what is gone, another process has removed
            with suppress(FileNotFoundError):
                about = (self.folder / name).lstat()
                if _NAME.fullmatch(name) and stat.S_ISREG(about.st_mode):
                    found.append((about.st_mtime, name, about.st_size))
                elif not is_leftover(name):
                    _log.warning(
                        "%s is no file of a prefix store and is left alone", self.folder / name
                    )
        for _, name, size in sorted(found):
            self._files[name] = size
            self._enter(name)

    def _enter(self, name: str) -> None:
        """Have a file found by what it begins with."""
        self._index[_digest_of(name)] = name
        if not self.states.only_grows:
            return
        try:
            seed, tokens = read_beginning(self.folder / name)
        except Exception as error:
            self._skip(name, error)
            return
        for digest, _ in _digests(seed, tokens, range(PIECE, len(tokens), PIECE)):
            self._index[digest] = name

    def _skip(self, name: str, error: Exception) -> None:
        """A file that cannot be read is not looked at again, may be written anew and is the next to go."""
        size = self._files.get(name, 0)
        self._forget(name)
        if not isinstance(error, FileNotFoundError):
            _log.warning("%s was skipped, it cannot be read: %s", self.folder / name, error)
            self._files = {name: size, **self._files}

    def _forget(self, name: str) -> None:
        self._files.pop(name, None)
        self._index = {digest: each for digest, each in self._index.items() if each != name}

    def _seed(self, tenant: str) -> str:
        """What digests begin with: a name of the model and the tenant that tells neither."""
        return hashlib.sha256(f"{self.key}\0{tenant}".encode()).hexdigest()

    # ---- reading

    def longest(self, tenant: str, tokens: array[int], least: int) -> Kept | None:
        """What is stored of the longest beginning of `tokens`, of `least` tokens or more."""
        with self._lock:
            lengths = {int(name.partition("-")[0]) for name in self._files}
            if self.states.only_grows:
                lengths |= {*range(PIECE, len(tokens) + 1, PIECE)}
            asked = sorted(length for length in lengths if least <= length <= len(tokens))
            for digest, _ in reversed(_digests(self._seed(tenant), tokens, asked)):
                # asked anew: a file that cannot be read leaves the index
                name = self._index.get(digest)
                if name in self._files and (kept := self._load(name, tenant, tokens)):
                    return kept if kept.length >= least else None
        return None

    def _load(self, name: str, tenant: str, tokens: array[int]) -> Kept | None:
        path = self.folder / name
        try:
            kept = unpack(read(path), self._seed(tenant), tokens, self.states)
        except Exception as error:
            self._skip(name, error)
            return None
        self._files[name] = self._files.pop(name)
        with suppress(OSError):
            # the order of use, for the next process
            os.utime(path)
        return kept

    # ---- writing

    def put(
        self,
        tenant: str,
        tokens: array[int],
        pages: Sequence[Pages],
        rest: list[Any] | None,
        *,
        wait: bool = False,
    ) -> None:
        """Have a text written; nothing happens where it is there or cannot be written.

        wait: until there is room among those that wait to be written; else it is forgotten.
        """
        # a kind of its own has more than is written
        if not all(type(each) is StateSnapshot for each in rest or ()):
            return
        seed, length = self._seed(tenant), len(tokens)
        borders = range(PIECE, length, PIECE) if self.states.only_grows else ()
        digests = [digest for digest, _ in _digests(seed, tokens, [*borders, length])]
        name = f"{length}-{digests[-1]}.safetensors"
        with self._lock:
            # a longer text has all of it, or all but a few tokens
            found = [self._index[digest] for digest in digests[-2:] if digest in self._index]
            if any(int(each.partition("-")[0]) >= length for each in found):
                return
            # before it is written: the texts that it has all of are next
            before = {digest: self._index[digest] for digest in digests if digest in self._index}
            self._index |= dict.fromkeys(digests, name)
        self._start()
        try:
            self._queue.put((name, lambda: pack(seed, tokens, pages, rest)), block=wait)
        except queue.Full:
            with self._lock:
                self._forget(name)
                self._index |= before

    def _start(self) -> None:
        # a forked process has no threads of its parent
        if self._writer is None or not self._writer.is_alive():
            self._writer = threading.Thread(target=self._write_all, daemon=True)
            self._writer.start()

    def _write_all(self) -> None:
        while True:
            name, pack = self._queue.get()
            try:
                self._write(name, pack())
            except Exception as error:
                # a full disk stays full: a line for each text would fill the log too
                if not self._failing:
                    _log.warning(
                        "a text was not added to the prefix store: %s; until one is, this is not said again",
                        error,
                    )
                self._failing = True
                with self._lock:
                    self._forget(name)
            else:
                self._failing = False
            finally:
                self._queue.task_done()

    def _write(self, name: str, content: bytes) -> None:
        with self._lock:
            if len(content) > self.limit:
                self._forget(name)
                return
            # before the new file: the limit is never passed
            while self._files and sum(self._files.values()) + len(content) > self.limit:
                oldest = next(iter(self._files))
                self._forget(oldest)
                (self.folder / oldest).unlink(missing_ok=True)
        with replace_file(self.folder / name) as file:
            file.write(content)
        with self._lock:
            self._files[name] = len(content)

    def wait(self) -> None:
        """Wait until all that was put is written."""
        self._queue.join()

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(self._files.values())


def _digest_of(name: str) -> str:
    return name.partition("-")[2].removesuffix(".safetensors")


def _digests(seed: str, tokens: array[int], lengths: Iterable[int]) -> list[tuple[str, int]]:
    """Digests of the first so many tokens, for ascending lengths, with the lengths."""
    digest, at, found = hashlib.sha256(seed.encode()), 0, []
    for length in lengths:
        digest.update(tokens[at:length].tobytes())
        at = length
        found.append((digest.hexdigest()[:32], length))
    return found


def model_key(model: Any, states: SequenceStates, kv_cache_dtype: str) -> str:
    """A name for what makes and reads the states of `model`: its form, its weights, its caches.

    Weights are sampled: models that differ were trained, and training changes every tensor that it changes in
    most places.
    """
    specs = [(repr(part.spec), part.layers) for part in states.parts]
    about = [model.config.to_dict(), str(model.dtype), model.kernels, kv_cache_dtype, specs]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 1024)].to("cpu", copy=True).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()[:32]
