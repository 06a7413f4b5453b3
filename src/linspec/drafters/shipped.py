"""Drafters that come with linspec for models that people have, found by what the model is.

folder = shipped_heads(model)     # None where none were made for it
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.resolve import resolve
from linspec.drafters.saved import read_drafter, targets_of
from linspec.errors import CheckpointError, ConfigError
from linspec.models.decoder import Decoder


def _folders() -> list[Path]:
    place = Path(str(importlib.resources.files("linspec") / "embedded" / "medusa"))
    return sorted(place.glob("*"))


def has_shipped_heads(folder: Path) -> bool:
    """Whether heads come with linspec for the model that lies here, by the names of such models."""
    named = (
        name for heads in _folders() for name in read_drafter(heads, "medusa").get("models", ())
    )
    return any(_place_of(name) == folder for name in named)


def _place_of(name: str) -> Path | None:
    try:
        return resolve(name)
    except CheckpointError:
        return None


def shipped_heads(target: Decoder) -> Path | None:
    """The directory of the Medusa heads that were made for `target`, whatever file it came from."""
    try:
        known = fingerprint(target)
    except ConfigError:
        return None
    for folder in _folders():
        if known in targets_of(read_drafter(folder, "medusa")):
            return folder
    return None
