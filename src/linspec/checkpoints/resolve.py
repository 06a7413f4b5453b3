"""Which directory or file a model's name stands for.

    folder = resolve("embedded-aug")

A name is a path, an embedded model or a model of a package that `linspec get` brought.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from linspec.checkpoints.gguf.reader import is_gguf
from linspec.checkpoints.packages import PACKAGES
from linspec.errors import CheckpointError, WrongType
from linspec.utils.border import check_files
from linspec.utils.files import restored
from linspec.utils.messages import did_you_mean, shown

# models that are part of this package, and where
EMBEDDED = {
    "embedded-softmax": "softmax",
    "embedded-aug": "aug",
    "embedded-diffusion": "diffusion",
    "smollm2-aug": "smollm2-aug",
    "smollm2-aug-22": "smollm2-aug-22",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# bytes of a file name that file systems hold
LONGEST_NAME = 255


def _path(source: object) -> Path:
    """A model's path; raises WrongType or CheckpointError for what names none."""
    if not isinstance(source, str | os.PathLike):
        raise WrongType(
            f"a model is named by a text or a path, got {shown(repr(source))}; give a directory, a GGUF "
            "file or a name"
        )
    path = Path(source)
    # an empty name would be the present directory
    if not str(source):
        raise CheckpointError("'' names no model directory; give one, or ./ for this one")
    if len(path.name.encode(errors="replace")) > LONGEST_NAME:
        raise CheckpointError(
            f"{shown(str(source))} is a name longer than the system allows; give a model directory"
        )
    return path


def resolve(source: str | Path) -> Path:
    """The directory or GGUF file of `source`: a path, or the name of a model that linspec knows."""
    if isinstance(source, str) and source in EMBEDDED:
        folder = Path(str(importlib.resources.files("linspec") / "embedded" / EMBEDDED[source]))
        if not folder.is_dir():
            raise CheckpointError(
                f"{source} is not part of this installation ({folder} is missing); install linspec "
                "again, or give the path of a model directory"
            )
        return folder
    if isinstance(source, str) and source in PACKAGES:
        return PACKAGES[source].found()
    folder = restored(_path(source))
    if not folder.is_dir() and not is_gguf(folder):
        names = (*EMBEDDED, *PACKAGES)
        raise CheckpointError(
            f"{shown(str(source))} is not a directory; give the path of a model directory, of a GGUF "
            f"file, or one of {', '.join(names)}. linspec downloads nothing by itself{_fetching(str(source))}"
            f"{did_you_mean(source, names)}"
        )
    check_files(folder)
    return folder


def _fetching(source: str) -> str:
    """How to get a model of Hugging Face's hub, for what looks like the name of one."""
    if not _HUB_NAME.fullmatch(source):
        return ""
    return f": `hf download {shown(source)} --local-dir DIR` does, if that is a name of Hugging Face's hub"
