"""Text in, token windows out: files, folders, jsonl, datasets directories and the embedded corpus.

documents = load_documents(["stdlib"], split="train")
stream = tokenize(documents, tokenizer, eos_id=0)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from linspec.decoding.protocols import CausalModelConfig
from linspec.errors import CheckpointError, InputError, WrongType
from linspec.utils.files import cache_dir, replace_file
from linspec.utils.messages import because, did_you_mean, shown
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_instance

log = logging.getLogger(__name__)

Split = Literal["train", "heldout", "all"]
# one source, or several
Sources = str | Path | Sequence[str | Path]

# One file (or record) in this many is held out, chosen by the hash of its bytes.
HELD_OUT_SHARE = 20
# characters that are tokenized between two saves
_SLICE = 16_000_000


def is_held_out(content: bytes) -> bool:
    """True for about one content in HELD_OUT_SHARE, the same ones on every machine."""
    digest = hashlib.sha256(content).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def check_sources(sources: object) -> tuple[str | Path, ...]:
    """The data sources that a caller gave, one or several; reads nothing.

    Raises InputError if there is none or one is not there, WrongType for what names none.
    """
    # a text by itself would otherwise be a list of letters
    found = (sources,) if isinstance(sources, str | os.PathLike) else sources
    if not isinstance(found, Sequence) or isinstance(found, bytes | bytearray | memoryview):
        raise WrongType(
            f"data are a text or a path, or a list of them, got {shown(sources)}; such as data='stdlib'"
        )
    if not found:
        raise InputError("no data were given; give a file, a folder or 'stdlib'")
    for source in found:
        _check_source(source)
    return tuple(found)


def _check_source(source: object) -> None:
    if not isinstance(source, str | os.PathLike):
        raise WrongType(
            f"a data source is a text or a path, got {shown(source)}; give a file, a folder or 'stdlib'"
        )
    if not str(source):
        raise InputError("a data source has no name; give a file, a folder or 'stdlib'")
    if str(source) != "stdlib" and not Path(source).exists():
        raise InputError(
            f"{Path(source)} does not exist; give a file, a folder or 'stdlib'"
            f"{did_you_mean(source, ('stdlib',))}"
        )


def load_documents(sources: Sources, split: Split = "all", field: str = "text") -> list[str]:
    """Every document of `sources` that belongs to `split`, in a stable order.

    A source is 'stdlib' (the Python standard library's source on this machine), a text file, a
    folder of text files, a .jsonl file (one document per line, under `field`) or a Hugging Face
    datasets directory. Raises InputError for a missing, empty or non-UTF-8 source.
    """
    sources = check_sources(sources)
    check_instance("field", field, str)
    documents: list[str] = []
    for source in sources:
        found = [text for text in _read(source, field) if text.strip()]
        if not found:
            raise InputError(f"{source}: no text found; --data needs at least one non-empty file")
        kept = [
            t for t in found if split == "all" or is_held_out(t.encode()) == (split == "heldout")
        ]
        documents += kept
    if not documents:
        raise InputError(
            f"{', '.join(map(str, sources))}: no document falls into the {split!r} split; give "
            "more files, or use the whole of it"
        )
    return documents


def train_and_heldout(sources: Sources, field: str = "text") -> tuple[list[str], list[str]]:
    """Documents to train on and documents never to train on, both non-empty.

    The split is by the hash of each document; where that leaves one side of a source empty (a single
    file), the end of each of its documents is held out instead. Each source is split by itself, so
    that what is held out of it does not depend on the others. Raises InputError like
    `load_documents`.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for source in check_sources(sources):
        for part, documents in zip(
            parts, _split(load_documents([source], "all", field)), strict=True
        ):
            part.extend(documents)
    return parts


def _split(documents: list[str]) -> tuple[list[str], list[str]]:
    parts: tuple[list[str], list[str]] = ([], [])
    for text in documents:
        parts[is_held_out(text.encode())].append(text)
    if all(parts):
        return parts
    cuts = [len(text) - max(1, len(text) // HELD_OUT_SHARE) for text in documents]
    return (
        [text[:cut] for text, cut in zip(documents, cuts, strict=True)],
        [text[cut:] for text, cut in zip(documents, cuts, strict=True)],
    )


def _read(source: str | Path, field: str) -> Iterator[str]:
    if str(source) == "stdlib":
        return _read_stdlib()
    path = Path(source)
    if path.is_dir():
        is_dataset = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
        return _read_dataset(path, field) if is_dataset else _read_folder(path)
    return _read_jsonl(path, field) if path.suffix == ".jsonl" else iter([_read_text(path)])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {because(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out"
        ) from error


def _read_folder(path: Path) -> Iterator[str]:
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if file.suffix == ".jsonl":
            raise InputError(f"{file}: name .jsonl files one by one, so that --field applies")
        yield _read_text(file)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}:{number} is not JSON: {error}; mend the line or leave it out"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise InputError(
                f"{path}:{number} has no text under {field!r}; it has: {shown(keys)}. Use --field"
            )
        _check_unicode(record[field], f"{path}:{number}")
        yield record[field]


def _check_unicode(text: str, where: str) -> None:
    """Raise InputError for half a surrogate pair, which JSON can write and no text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} is not Unicode text at character {error.start}: {error.reason}; mend the line or "
            "leave it out"
        ) from error


def _read_dataset(path: Path, field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path} is a datasets directory: pip install 'linspec[data]'") from error
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    # whatever Arrow and datasets make of damaged files
    except Exception as error:
        raise InputError(
            f"{path} is no sound datasets directory: {error}; save the data again"
        ) from error
    parts = loaded.values() if isinstance(loaded, dict) else [loaded]
    for part in parts:
        if field not in part.column_names:
            raise InputError(
                f"{path} has no column {field!r}; it has: {', '.join(part.column_names)}"
            )
        for number, text in enumerate(part[field], 1):
            if not isinstance(text, str):
                raise InputError(
                    f"{path}: row {number} of column {field!r} holds {shown(repr(text))}, no text; name a "
                    "column of texts with --field"
                )
            yield text


def _read_stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        for name in sorted(files):
            if name.endswith(".py"):
                try:
                    yield (Path(folder) / name).read_bytes().decode("utf-8")
                except UnicodeDecodeError:
                    # a handful of the standard library's own tests are in other encodings
                    continue


def end_of_text(tokenizer: Any, config: CausalModelConfig) -> int:
    """The token that closes a document; raises InputError when neither side names one."""
    known = (tokenizer.eos_token_id, *config.eos_ids)
    found = next((token for token in known if token is not None), None)
    if found is None:
        raise InputError("neither the tokenizer nor the model names an end-of-text token")
    return int(found)


def tokenize(documents: Iterable[str], tokenizer: Any, eos_id: int) -> np.ndarray:
    """All documents as one stream of token ids, each closed by `eos_id`; cached on disk.

    `tokenizer` is a transformers fast tokenizer. The cache key covers texts and vocabulary.
    """
    documents = list(documents)
    backend = tokenizer.backend_tokenizer
    key = hashlib.sha256(backend.to_str().encode())
    for text in documents:
        key.update(hashlib.sha256(text.encode()).digest())
    path = cache_dir() / "tokens" / f"{key.hexdigest()[:32]}.npy"
    if (stored := _kept(path, _largest_token(backend, eos_id), mmap_mode="r")) is not None:
        return stored
    stream = _encode(_slices(documents), backend, eos_id, path)
    _store(path, stream)
    return stream


def _slices(documents: list[str]) -> list[list[str]]:
    """The documents in order, cut into lists of about `_SLICE` characters."""
    found: list[list[str]] = [[]]
    size = 0
    for text in documents:
        if found[-1] and size + len(text) > _SLICE:
            found.append([])
            size = 0
        found[-1].append(text)
        size += len(text)
    return found


def _encode(slices: list[list[str]], backend: Any, eos_id: int, path: Path) -> np.ndarray:
    """The tokens of all slices; finished ones are kept beside `path` until all are done."""
    if len(slices) == 1:
        return _encode_slice(slices[0], backend, eos_id)
    found, largest = [], _largest_token(backend, eos_id)
    kept = [path.with_name(f"{path.stem}-{i}.npy") for i in range(len(slices))]
    with Progress("tokenize", len(slices)) as progress:
        for done, (documents, part) in enumerate(zip(slices, kept, strict=True), 1):
            stream = _kept(part, largest)
            if stream is None:
                stream = _encode_slice(documents, backend, eos_id)
                _store(part, stream)
            found.append(stream)
            progress.update(done)
    for part in kept:
        part.unlink(missing_ok=True)
    return np.concatenate(found)


def _encode_slice(documents: list[str], backend: Any, eos_id: int) -> np.ndarray:
    try:
        encodings = backend.encode_batch(documents, add_special_tokens=False)
    # the library raises bare Exception for what its file cannot encode
    except Exception as error:
        raise InputError(
            f"this tokenizer cannot encode the data: {error}; leave out what it does not know, or copy "
            "the tokenizer's files again"
        ) from error
    return np.concatenate([np.asarray([*each.ids, eos_id], dtype=np.int32) for each in encodings])


def _largest_token(backend: Any, eos_id: int) -> int:
    return max(eos_id, *backend.get_vocab(with_added_tokens=True).values())


def _kept(path: Path, largest: int, **options: Any) -> np.ndarray | None:
    """The tokens that an earlier run kept; None where there are none, or damaged ones."""
    try:
        stream: np.ndarray = np.load(path, **options)
        if stream.dtype != np.int32 or stream.ndim != 1 or not len(stream):
            raise ValueError("it holds no tokens")
        if stream.min() < 0 or stream.max() > largest:
            raise ValueError("it holds tokens that the tokenizer does not have")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError) as error:
        log.warning("%s is damaged (%s); the text is tokenized again", path, error)
        return None
    return stream


def _store(path: Path, stream: np.ndarray) -> None:
    # the cache only saves time: a full or read-only disk must not stop the work
    with contextlib.suppress(CheckpointError), replace_file(path) as file:
        np.save(file, stream)


class Windows:
    """Random windows of a token stream: the same for the same seed and step, so resuming is exact.

    Processes that train together each give their index as `process` and see windows of their own.
    """

    def __init__(self, stream: np.ndarray, context: int, seed: int, *, process: int = 0) -> None:
        if len(stream) < 2:
            raise InputError(
                f"{len(stream)} tokens of data are too few to train on; give more text"
            )
        self.stream, self.seed, self.process = stream, seed, process
        self.context = min(context, len(stream) - 1)

    def batch(self, step: int, rows: int, context: int | None = None) -> torch.Tensor:
        """Token ids [rows, context + 1]; position t predicts position t + 1."""
        context = min(context or self.context, len(self.stream) - 1)
        rng = np.random.default_rng([self.seed, step, self.process])
        starts = rng.integers(0, len(self.stream) - context, size=rows)
        picked = np.stack([self.stream[s : s + context + 1] for s in starts])
        return torch.from_numpy(picked.astype(np.int64))
