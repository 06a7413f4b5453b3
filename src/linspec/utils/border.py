"""The border for JSON: linspec checks what it reads from disk once, here, before anything relies on it.

    data = read_json(folder / "config.json")                 # an object, or a named error
    config = parse(MixerConfig, data, "config.json")         # every type and rule checked by name

Tensors have a border of their own in `checkpoints/tensors.py`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from linspec.errors import CheckpointError, ConfigError, LinspecError
from linspec.utils.messages import because, quoted, shown

T = TypeVar("T")

# what `parse` lets a JSON object of a class with this setting hold: nothing that the class does not know
STRICT = {"extra": "forbid"}

# settings are a few kilobytes; a tokenizer of the largest kind has 40 MB
LARGEST_BYTES = 256 * 2**20


# what the files are called that are read of a directory
_READ = (".json", ".jsonl", ".jinja", ".model", ".txt", ".safetensors")


def check_files(folder: Path, error: type[LinspecError] = CheckpointError) -> None:
    """Raise `error` for a pipe or a device among the files of a directory: its reader would wait for ever."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_READ):
                _check_file(Path(entry.path), error)


def _check_file(path: Path, error: type[LinspecError]) -> None:
    # unlike the methods of Path, these never raise
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise error(f"{path} is a pipe or a device, not a file; copy the file again")


def read_json(path: Path, error: type[LinspecError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file; raises `error` if there is none."""
    _check_file(path, error)
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"it is larger than {LARGEST_BYTES / 2**20:.0f} MiB")
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
    except OSError as cause:
        raise error(f"cannot read {because(cause)}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(
            f"cannot read {path}: it is not valid JSON: {cause}; copy the file again"
        ) from cause
    if not isinstance(data, dict):
        raise error(f"{path} must hold a JSON object, got {shown(data)}; copy the file again")
    return data


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def parse(kind: type[T], data: object, where: object) -> T:
    """`data` as a `kind` (a dataclass or any annotation); raises ConfigError that names the entry.

    Types are strict: 16.5, "16" and true are no whole numbers. The rules in the `__post_init__` of a
    dataclass apply too.
    """
    # only some commands read JSON of linspec, and all would wait for the import
    from pydantic import ValidationError

    try:
        text = json.dumps(data)
        adapter = _adapter(kind)  # type: ignore[arg-type]  # annotations can be hashed
        found: T = adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{where}: {_sentence(first)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {shown(data)} cannot be written as JSON: {error}") from error
    return found


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _sentence(error: Any) -> str:
    """One error of pydantic as a sentence: the entry, the rule, the value."""
    place = shown(".".join(map(str, error["loc"])))
    own = error.get("ctx", {}).get("error")
    if isinstance(own, LinspecError):
        return f"{place}: {own}" if place else str(own)
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"{place} is not an entry that this linspec knows"
    message = error["msg"].replace("Input should", f"{place or 'it'} should")
    return f"{message}, got {quoted(error['input'])}"
