"""States of earlier texts on disk, for what no longer fits into memory and for the next process.

One file holds one text whole: its tokens and what a slot remembers of them. Who may read the files may read
the texts, so the directory is the owner's alone. Files are written by a thread of their own, aside and then
renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import re
import threading
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save

from linspec.engine.budget import PIECE
from linspec.engine.prefix_tree import as_tokens, common
from linspec.errors import CheckpointError
from linspec.kernels.step_plan import PAGE
from linspec.state.pages import Page
from linspec.state.sequence_states import Pages, SequenceStates
from linspec.state.slots import StateSnapshot
from linspec.utils.files import is_leftover, replace_file

_log = logging.getLogger("linspec")
_FORMAT = "2"
_NAME = re.compile(r"(\d+)-[0-9a-f]{32}\.safetensors")
# texts that wait to be written; more are forgotten, so that a slow disk takes no memory and no time
_WAITING = 8


class Kept(NamedTuple):
    """The state of a text: its tokens, what is held beside pages, and its pages from a position on."""

    tokens: array[int]
    rest: list[Any] | None
    pages: Callable[[int], list[Pages]]

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.tokens)


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
        """Find what earlier processes left."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = [(path.stat(), path.name) for path in self.folder.iterdir()]
        except OSError as error:
            raise CheckpointError(
                f"the prefix store {self.folder} cannot be used: {error.strerror}; choose another directory"
            ) from error
        for stat, name in sorted(found, key=lambda each: each[0].st_mtime):
            if _NAME.fullmatch(name):
                self._files[name] = stat.st_size
                self._enter(name)
            elif not is_leftover(name):
                _log.warning(
                    "%s is no file of a prefix store and is left alone", self.folder / name
                )

    def _enter(self, name: str) -> None:
        """Have a file found by what it begins with."""
        self._index[_digest_of(name)] = name
        if not self.states.only_grows:
            return
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                seed, tokens = (
                    file.metadata()["seed"],
                    as_tokens(file.get_tensor("tokens").tolist()),
                )
        except Exception as error:
            self._skip(name, error)
            return
        for digest, _ in _digests(seed, tokens, range(PIECE, len(tokens), PIECE)):
            self._index[digest] = name

    def _skip(self, name: str, error: Exception) -> None:
        """A file that cannot be read is not looked at again, and may be written anew."""
        if not isinstance(error, FileNotFoundError):
            _log.warning("%s was skipped, it cannot be read: %s", self.folder / name, error)
        self._forget(name)

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
            digests = _digests(self._seed(tenant), tokens, asked)
            known = [self._index[digest] for digest, _ in digests if digest in self._index]
            for name in reversed(known):
                if name in self._files and (kept := self._load(name, tokens)):
                    return kept if kept.length >= least else None
        return None

    def _load(self, name: str, tokens: array[int]) -> Kept | None:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                found = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
                kept = _unpacked(found, file.metadata() or {}, tokens, self.states)
        except Exception as error:
            self._skip(name, error)
            return None
        self._files[name] = self._files.pop(name)
        with suppress(OSError):
            # the order of use, for the next process
            (self.folder / name).touch()
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
            self._queue.put((name, lambda: _packed(seed, tokens, pages, rest)), block=wait)
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


def _packed(seed: str, tokens: array[int], pages: Sequence[Pages], rest: list[Any] | None) -> bytes:
    """The content of a file."""
    tensors = {"tokens": torch.tensor(tokens.tolist())}
    for part, each in enumerate(zip(*pages, strict=True)):
        for name in ("keys", "values"):
            rows = torch.cat([getattr(page, name) for page in each], dim=2)
            # the last page may go on behind the text
            tensors[f"rows.{part}.{name}"] = rows[:, :, : len(tokens)]
    places = []
    for part, copy in enumerate(rest or ()):
        places.append([copy.length, copy.base_position])
        for name in ("keys", "values", "sums"):
            if getattr(copy, name) is not None:
                tensors[f"rest.{part}.{name}"] = getattr(copy, name)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {"format": _FORMAT, "seed": seed, "places": json.dumps(places)}
    return save(kept, about | {"sum": _checksum(kept, about["places"])})


def _checksum(tensors: Mapping[str, torch.Tensor], places: str) -> str:
    """Of all that a slot would be given: a disk that forgets a bit must not change an answer."""
    found = zlib.crc32(places.encode())
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def _unpacked(
    found: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    tokens: array[int],
    states: SequenceStates,
) -> Kept:
    """What a file holds of the beginning of `tokens`; raises ValueError for one that it has not begun."""
    mine = as_tokens(found["tokens"].tolist())
    shared = common(mine, tokens, 0)
    whole = shared == len(mine) or (states.only_grows and shared)
    if metadata.get("format") != _FORMAT or not whole:
        raise ValueError("it holds another text or is of another version")
    if metadata["sum"] != _checksum(found, metadata["places"]):
        raise ValueError("it is not what was written: its checksum differs")
    growing = [part for part in states.parts if part.grows]
    others = [part for part in states.parts if not part.grows]
    rows = tuple(
        (found[f"rows.{part}.keys"], found[f"rows.{part}.values"]) for part in range(len(growing))
    )
    places = json.loads(metadata["places"])
    empty = states.empty(1)
    rest = []
    for part, (state, place, like) in enumerate(zip(others, places, empty.rest(0), strict=True)):
        tensors = {name: found.get(f"rest.{part}.{name}") for name in ("keys", "values", "sums")}
        copy = replace(like, length=place[0], base_position=place[1], **tensors)
        state.check(copy)
        rest.append(copy)
    for (keys, values), state in zip(rows, growing, strict=True):
        if keys.shape[2] != len(mine) or values.shape[2] != len(mine):
            raise ValueError(f"it has rows of {keys.shape[2]} tokens, not of {len(mine)}")
        if keys.dtype != state.keys.dtype or values.dtype != state.values.dtype:
            raise ValueError(f"its rows are {keys.dtype}, not {state.keys.dtype}")
    return Kept(mine[:shared], rest or None, lambda start: _pages_of(rows, start, shared))


def _pages_of(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], start: int, stop: int
) -> list[Pages]:
    """Rows of whole texts as pages, from the one with position `start` on to the one ahead of `stop`."""
    numbers = range(start // PAGE, -(-stop // PAGE))
    places = [slice(PAGE * number, min(PAGE * (number + 1), stop)) for number in numbers]
    return [tuple(Page(k[:, :, at], v[:, :, at]) for k, v in rows) for at in places if rows]


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
