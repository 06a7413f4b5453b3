"""A checksum of every tensor file, written beside it and compared by `linspec verify MODEL --files`.

checksums.json holds the SHA-256 of each safetensors file of its directory. Loading does not compare them:
reading a mapped file whole takes many times longer than loading it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from linspec.errors import CheckpointError, ConfigError
from linspec.utils.border import parse, read_json

FILE = "checksums.json"
PATTERN = "*.safetensors"


def write_checksums(folder: Path) -> None:
    """Write the checksums of the tensor files in `folder`; the last thing before it is published."""
    sums = {path.name: _sha256(path) for path in sorted(folder.glob(PATTERN))}
    text = json.dumps({"sha256": sums}, indent=2) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def check_files(folder: Path) -> dict[str, str]:
    """By tensor file of `folder`: 'match', or 'none' where nobody wrote a checksum.

    Raises CheckpointError for a file that differs from its checksum or is missing.
    """
    expected = _read(folder)
    found = {path.name: path for path in sorted(folder.glob(PATTERN))}
    for name, wanted in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing; copy or download it again")
        if _sha256(found[name]) != wanted:
            raise CheckpointError(
                f"{folder / name} is not the file that was written: its SHA-256 differs from the one in "
                f"{FILE}; copy or download it again"
            )
    return {name: "match" if name in expected else "none" for name in found}


def _read(folder: Path) -> dict[str, str]:
    if not (folder / FILE).exists():
        return {}
    entry = read_json(folder / FILE).get("sha256")
    try:
        return parse(dict[str, str], entry, f"{folder / FILE}: sha256")
    except ConfigError as error:
        raise CheckpointError(f"{error}; copy the file again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
