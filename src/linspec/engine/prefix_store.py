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
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save

from linspec.engine.prefix_tree import as_tokens, cut
from linspec.errors import CheckpointError
from linspec.state.sequence_states import Rows, SequenceStates
from linspec.state.slots import StateSnapshot
from linspec.utils.files import is_leftover, replace_file

_log = logging.getLogger("linspec")
_FORMAT = "1"
_NAME = re.compile(r"(\d+)-[0-9a-f]{32}\.safetensors")
# texts that wait to be written; more are forgotten, so that a slow disk takes no memory and no time
_WAITING = 8


class Kept(NamedTuple):
    """The state of a text: its tokens, what is held beside rows, and its rows from a position on."""

    tokens: array[int]
    rest: list[Any] | None
    rows: Callable[[int], Rows]

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.tokens)


class PrefixStore:
    """Files of one model in `folder`, at most `limit` bytes of them; key names the model and its caches."""

    def __init__(self, folder: Path, key: str, limit: int) -> None:
        self.folder, self.key, self.limit = folder / key, key, limit
        # bytes of each file, the longest unused first
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._queue: queue.Queue[tuple[str, Callable[[], bytes]]] = queue.Queue(_WAITING)
        self._writer: threading.Thread | None = None
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
            elif not is_leftover(name):
                _log.warning(
                    "%s is no file of a prefix store and is left alone", self.folder / name
                )

    # ---- reading

    def longest(
        self, tenant: str, tokens: array[int], least: int, states: SequenceStates
    ) -> Kept | None:
        """The longest stored text of `least` tokens or more that `tokens` begin with."""
        with self._lock:
            names = set(self._files)
        lengths = {int(name.partition("-")[0]) for name in names}
        asked = sorted(length for length in lengths if least <= length <= len(tokens))
        for name, length in reversed(list(self._names(tenant, tokens, asked))):
            if name in names and (kept := self._load(name, tokens[:length], states)):
                return kept
        return None

    def _names(
        self, tenant: str, tokens: array[int], lengths: Iterable[int]
    ) -> Iterable[tuple[str, int]]:
        """Names of the files of the first so many tokens, for ascending lengths."""
        digest, at = hashlib.sha256(f"{self.key}\0{tenant}\0".encode()), 0
        for length in lengths:
            digest.update(tokens[at:length].tobytes())
            at = length
            yield f"{length}-{digest.hexdigest()[:32]}.safetensors", length

    def _load(self, name: str, tokens: array[int], states: SequenceStates) -> Kept | None:
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as file:
                found = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
                kept = _unpacked(found, file.metadata() or {}, tokens, states)
            with suppress(OSError):
                path.touch()
        except FileNotFoundError:
            kept = None
        except Exception as error:
            _log.warning("%s was skipped, it cannot be read: %s", path, error)
            kept = None
        with self._lock:
            size = self._files.pop(name, 0)
            if kept is not None:
                self._files[name] = size
        return kept

    # ---- writing

    def put(
        self, tenant: str, tokens: array[int], rows: Sequence[Rows], rest: list[Any] | None
    ) -> None:
        """Have a text written; nothing happens where it is there, cannot be written or too many wait."""
        if not all(isinstance(each, StateSnapshot) for each in rest or ()):
            return
        ((name, _),) = self._names(tenant, tokens, [len(tokens)])
        with self._lock:
            if name in self._files:
                self._files[name] = self._files.pop(name)
                return
        self._start()
        with suppress(queue.Full):
            self._queue.put_nowait((name, lambda: _packed(tokens, rows, rest)))

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
                _log.warning("a text was not added to the prefix store: %s", error)
            finally:
                self._queue.task_done()

    def _write(self, name: str, content: bytes) -> None:
        if len(content) > self.limit:
            return
        with self._lock:
            self._files.pop(name, None)
            # before the new file: the limit is never passed
            while self._files and sum(self._files.values()) + len(content) > self.limit:
                oldest = next(iter(self._files))
                del self._files[oldest]
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


def _packed(tokens: array[int], rows: Sequence[Rows], rest: list[Any] | None) -> bytes:
    """The content of a file."""
    tensors = {"tokens": torch.tensor(tokens.tolist())}
    for part, pieces in enumerate(zip(*rows, strict=True)):
        for name, each in zip(("keys", "values"), zip(*pieces, strict=True), strict=True):
            tensors[f"rows.{part}.{name}"] = torch.cat(each, dim=2)
    places = []
    for part, copy in enumerate(rest or ()):
        places.append([copy.length, copy.base_position])
        for name in ("keys", "values", "sums"):
            if getattr(copy, name) is not None:
                tensors[f"rest.{part}.{name}"] = getattr(copy, name)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(kept, {"format": _FORMAT, "places": json.dumps(places)})


def _unpacked(
    found: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    tokens: array[int],
    states: SequenceStates,
) -> Kept:
    """What a file holds; raises ValueError if that is another text, or of another model."""
    if metadata.get("format") != _FORMAT or as_tokens(found["tokens"].tolist()) != tokens:
        raise ValueError("it holds another text or is of another version")
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
        if keys.shape[2] != len(tokens) or values.shape[2] != len(tokens):
            raise ValueError(f"it has rows of {keys.shape[2]} tokens, not of {len(tokens)}")
        if keys.dtype != state.keys.dtype or values.dtype != state.values.dtype:
            raise ValueError(f"its rows are {keys.dtype}, not {state.keys.dtype}")
    return Kept(tokens, rest or None, lambda start: cut(rows, start, len(tokens)))


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
