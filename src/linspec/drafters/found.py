"""Where the trained drafter of a model is: named, in the model's directory, or shipped with linspec for it.

folder = find_drafter("eagle", None, context)     # raises DrafterError where there is none
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.resolve import resolve
from linspec.drafters.base import DrafterContext
from linspec.drafters.saved import CONFIG_FILE, read_drafter, targets_of
from linspec.errors import CheckpointError, ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.options import option


def path_option(what: str, kind: str) -> Any:
    """The option `path` of a trained drafter: the directory of `what` it needs."""
    return option(
        f"directory of {what}; none is {kind!r} in the model's directory, else what linspec has for it",
        default=None,
        short=True,
    )


def find_drafter(kind: str, path: Path | None, context: DrafterContext) -> Path:
    """The directory of a drafter: `path`, or what is at hand for the target of `context`.

    Raises DrafterError where there is none.
    """
    found = path or _at_hand(kind, context)
    if found is None or not found.exists():
        place = path or (context.source / kind if context.source else None)
        where = "" if place is None else f" in {place}"
        shipped = "" if path else ", and none comes with linspec for this model"
        raise DrafterError(
            f"no drafter of kind {kind!r}{where}{shipped}; train one with `linspec train-drafter MODEL "
            f"--kind {kind} --out DIR` and name its directory: {kind}:DIR"
        )
    return found


def is_at_hand(kind: str, context: DrafterContext) -> bool:
    """Whether a drafter of a kind is found by its name alone."""
    return _at_hand(kind, context) is not None


def _at_hand(kind: str, context: DrafterContext) -> Path | None:
    """The drafter in the directory of the model, else the one that comes with linspec for it."""
    beside = context.source / kind if context.source else None
    if beside is not None and (beside / CONFIG_FILE).exists():
        return beside
    return shipped_drafter(kind, context.target) if isinstance(context.target, Decoder) else None


def shipped_drafter(kind: str, target: Decoder) -> Path | None:
    """The drafter of a kind that was made for `target`, whatever file it came from; None without one."""
    folders = list(_shipped(kind))
    if not folders:
        return None
    try:
        known = fingerprint(target)
    except ConfigError:
        return None
    return next((f for f in folders if known in targets_of(read_drafter(f, kind))), None)


def shipped_for(folder: Path) -> list[str]:
    """The kinds of drafters that come with linspec for the model that lies here, by its name."""
    kinds = sorted(each.name for each in _drafters().glob("*"))
    return [kind for kind in kinds if any(_is_for(each, kind, folder) for each in _shipped(kind))]


def _is_for(drafter: Path, kind: str, folder: Path) -> bool:
    names = read_drafter(drafter, kind).get("models", ())
    return any(_place_of(name) == folder for name in names)


def _place_of(name: str) -> Path | None:
    try:
        return resolve(name)
    except CheckpointError:
        return None


def _shipped(kind: str) -> Iterator[Path]:
    yield from sorted((_drafters() / kind).glob("*"))


def _drafters() -> Path:
    return Path(str(importlib.resources.files("linspec") / "embedded" / "drafters"))
