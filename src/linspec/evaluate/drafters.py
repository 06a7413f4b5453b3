"""Drafters that come along when their model is quantized: packed, and heads measured before and after."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from linspec.checkpoints.quantized import ENTRY
from linspec.checkpoints.tensors import check_finite
from linspec.drafters.base import files_of
from linspec.drafters.heads import Heads
from linspec.drafters.saved import CONFIG_FILE, kind_of, read_drafter
from linspec.drafters.trained import Files
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.train.drafters.medusa import calibrate
from linspec.utils.files import is_leftover

_log = logging.getLogger("linspec")
_CONTEXT = 512


@dataclass(slots=True)
class Companion:
    """The drafter in one folder of a model directory, which can be packed.

    facts: what drafter.json says. before, after: of heads, how often the likeliest guess of each is the
    target's choice on the same held-out text: plain on the plain target, and packed on the quantized one.
    """

    folder: Path
    files: Files
    drafter: nn.Module
    facts: dict[str, Any]
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def measure(self, model: Decoder, stream: np.ndarray) -> None:
        """Count the right guesses of the plain drafter."""
        self.before = _first_guesses(model, self.drafter, stream)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        guesses = {"first_guess_before": self.before, "first_guess_after": self.after}
        return {"kind": self.facts["kind"], **(guesses if self.before else {})}


def find_companions(folder: Path, model: Decoder) -> list[Companion]:
    """The drafters in a plain model directory that can be packed, checked and not measured yet.

    The others stay behind, with a warning. Raises DrafterError for one of another model and ConfigError for
    one that is quantized.
    """
    found = []
    for path in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        inside = path.parent
        if is_leftover(inside.name):
            continue
        kind = kind_of(inside)
        if not isinstance(kind, str):
            raise DrafterError(
                f"{inside / CONFIG_FILE} names no kind of drafter; copy the drafter again, or remove it"
            )
        if (files := _files_to_pack(inside, kind)) is None:
            continue
        facts = read_drafter(inside, kind)
        if ENTRY in facts:
            raise ConfigError(f"{inside} is quantized already; quantize the one it was made from")
        drafter = files.load(inside, model)
        for name, tensor in drafter.state_dict().items():
            check_finite(name, tensor, inside, DrafterError)
        found.append(Companion(inside, files, drafter, facts))
    return found


def _files_to_pack(inside: Path, kind: object) -> Files | None:
    """What packs the drafter in a directory; None, with a warning, where it stays behind."""
    try:
        files = files_of(inside)
    except DrafterError as error:
        _log.warning("%s stays behind: %s", inside, error)
        return None
    if files.pack is None:
        _log.warning(
            "%s stays behind: drafters of kind %r are not packed; train one for the quantized model",
            inside,
            kind,
        )
        return None
    return files


def save_companion(
    companion: Companion, model: Decoder, out: Path, bits: int, stream: np.ndarray
) -> None:
    """Pack the drafter of a model that now is quantized, write it into `out`, and measure it."""
    assert companion.files.pack is not None
    place = out / companion.folder.name
    packed = companion.files.pack(companion.drafter, model, place, bits, companion.facts)
    companion.after = _first_guesses(model, packed, stream)


def _first_guesses(model: Decoder, drafter: nn.Module, stream: np.ndarray) -> list[float]:
    """How often the likeliest guess of each head is right; nothing for a drafter without heads."""
    if not isinstance(drafter, Heads):
        return []
    context = min(_CONTEXT, model.config.position_limit or _CONTEXT)
    rates = calibrate(model, drafter, stream, context=context, tokens=len(stream))
    return [row[0] for row in rates]
