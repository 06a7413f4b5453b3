"""Which KV heads of a model recall, as `linspec calibrate` found it: a small file with its model's hash.

    heads = calibrated_heads(model, "lserve:budget=1024,exact=22", count=22, source=Path("model"))

It lies in MODEL/calibration where MODEL is a directory of one's own, else in linspec's cache directory, by
the fingerprint of the model. What comes with linspec lies in `embedded/calibration`.
"""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linspec.checkpoints.fingerprint import fingerprint, weight_fingerprint
from linspec.checkpoints.resolve import EMBEDDED
from linspec.errors import CheckpointError, ConfigError
from linspec.mixers.exact_heads import Heads
from linspec.models.decoder import Decoder
from linspec.models.lserve import LserveOptions, lserve_options
from linspec.utils.border import parse, read_json
from linspec.utils.files import cache_dir, restored
from linspec.utils.format_version import KEY, check_format
from linspec.utils.messages import shown

FOLDER, FILE = "calibration", "calibration.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The exact KV heads of each layer, and what they were found for.

    target, weights: fingerprints of the model, of its last weights and of all (None in files of older
    versions). plan: what was asked for. facts: how the search went, for people.
    """

    target: str
    heads: Heads
    plan: dict[str, Any]
    facts: dict[str, Any]
    weights: str | None = None


def calibration_name(options: LserveOptions, count: int) -> str:
    """What tells the calibrations of one model apart."""
    return f"lserve-{count}-{options.window}-{options.sinks}"


def calibration_folder(source: Path | None, name: str, known: str) -> Path:
    """Where a new calibration is kept: beside the model if that is a directory that may be written to.

    source: of the model, None for one that was loaded elsewhere. known: the model's fingerprint.
    """
    beside = _beside(source, name)
    if beside is not None and os.access(beside.parent.parent, os.W_OK):
        return beside
    return _cached(name, known)


def calibrated_heads(
    model: Decoder, spec: str, count: int, source: Path | None, given: str | None = None
) -> Heads:
    """The `count` KV heads of `model` that recall.

    given: what the user calls the model. Raises ConfigError with the command that finds them where nobody
    did, CheckpointError for what was found for another model, or is damaged.
    """
    name, known = calibration_name(lserve_options(spec), count), fingerprint(model)
    shipped = Path(str(importlib.resources.files("linspec"))) / "embedded" / FOLDER / known / name
    command = f"linspec calibrate {given or source or 'MODEL'} --attention {spec}"
    beside = _beside(source, name)
    for folder in (*([beside] if beside else []), _cached(name, known), shipped):
        path = restored(folder) / FILE
        if path.is_file():
            return _checked(read_calibration(path), path, model, known, command)
    raise ConfigError(
        f"attention={shown(repr(spec))}: which {count} of the {model.config.layers * model.config.kv_heads} "
        f"KV heads of this model recall is not known yet; `{command}` finds it, once"
    )


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file; raises CheckpointError for an unsound or newer one."""
    data = read_json(path)
    check_format(data, path)
    data.pop(KEY, None)
    try:
        return parse(Calibration, data, path)
    except ConfigError as error:
        raise CheckpointError(f"{error}; run linspec calibrate again with --overwrite") from error


def _checked(found: Calibration, path: Path, model: Decoder, known: str, command: str) -> Heads:
    theirs = found.target, found.weights
    # of what says nothing of all weights, their hash need not be made
    ours = known, weight_fingerprint(model) if found.weights is not None else None
    if any(a != b for a, b in zip(theirs, ours, strict=True) if None not in (a, b)):
        raise CheckpointError(
            f"{path} was calibrated for a model with the fingerprint {_shown(theirs)}, and this one has "
            f"{_shown(ours)}: its weights or its configuration have changed. Calibrate again: {command} "
            "--overwrite"
        )
    config = model.config
    sound = len(found.heads) == config.layers and all(
        sorted(set(layer)) == list(layer) and set(layer) <= set(range(config.kv_heads))
        for layer in found.heads
    )
    if not sound:
        raise CheckpointError(
            f"{path} does not name KV heads of {config.layers} layers of {config.kv_heads}; calibrate again: "
            f"{command} --overwrite"
        )
    return found.heads


def _shown(fingerprints: tuple[str | None, ...]) -> str:
    return shown("-".join(each for each in fingerprints if each is not None))


def _beside(source: Path | None, name: str) -> Path | None:
    """The place in a model's directory; None where that is a file, or part of linspec."""
    own = Path(str(importlib.resources.files("linspec"))) / "embedded"
    inside = source is not None and source.resolve().parent == own.resolve()
    if source is None or not source.is_dir() or (inside and source.name in EMBEDDED.values()):
        return None
    return source / FOLDER / name


def _cached(name: str, known: str) -> Path:
    return cache_dir() / FOLDER / known / name
