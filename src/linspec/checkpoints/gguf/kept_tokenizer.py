"""Tokenizers of GGUF files that take long to build, kept ready in the cache directory.

    backend = kept(file, build)

SentencePiece's kind has no list of merges in the file: all ways to halve every piece are tried, which
takes two seconds for the 262,144 pieces of Gemma 3. The library's own form of the result is read in 0.8.
LINSPEC_NO_CACHE=1 neither reads nor writes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

from linspec.checkpoints.gguf.reader import GgufFile
from linspec.errors import CheckpointError
from linspec.utils.files import cache_dir, replace_text

SWITCH = "LINSPEC_NO_CACHE"
# raised with every change of what is built
FORMAT = 1
# pieces that are built in less than the tenth of a second
FEW = 20_000

_log = logging.getLogger("linspec")


def kept(file: GgufFile, pieces: int, build: Callable[[], Tokenizer]) -> Tokenizer:
    """What `build` makes of `file`: as it was kept, or made now and kept for the next time.

    A directory that cannot be written to only means building it again next time.
    """
    if pieces < FEW or os.environ.get(SWITCH):
        return build()
    path = cache_dir() / "tokenizers" / f"{_key(file)}.json"
    # whatever is wrong with it, the file itself is still there
    with contextlib.suppress(Exception):
        return Tokenizer.from_file(str(path))
    backend = build()
    with contextlib.suppress(CheckpointError):
        text = backend.to_str()
        replace_text(path, text)
        _log.info("%s: its tokenizer is kept in %s (%.0f MB)", file.path, path, len(text) / 1e6)
    return backend


def _key(file: GgufFile) -> str:
    """Of this very file, and of what reads it."""
    path = Path(file.path).resolve()
    stat = path.stat()
    facts = (
        *(FORMAT, version("tokenizers"), path),
        *(stat.st_size, stat.st_mtime_ns, stat.st_ino),
    )
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]
