"""Drafters that come with linspec for models that people have, found by what the model is.

folder = shipped_heads(model)     # None where none were made for it
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from linspec.checkpoints.fingerprint import fingerprint
from linspec.drafters.saved import read_drafter, targets_of
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder


def shipped_heads(target: Decoder) -> Path | None:
    """The directory of the Medusa heads that were made for `target`, whatever file it came from."""
    try:
        known = fingerprint(target)
    except ConfigError:
        return None
    place = Path(str(importlib.resources.files("linspec") / "embedded" / "medusa"))
    for folder in sorted(place.glob("*")):
        if known in targets_of(read_drafter(folder)):
            return folder
    return None
