"""Drafters that come along when their model is quantized: packed, and measured before and after."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from linspec.checkpoints.tensors import check_finite
from linspec.drafters.heads import MedusaHeads
from linspec.drafters.packed import PackedHeads
from linspec.drafters.saved import CONFIG_FILE, kind_of, read_drafter
from linspec.drafters.saved_heads import load_heads, save_packed
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer
from linspec.train.drafters.medusa import calibrate
from linspec.utils.files import is_leftover

_log = logging.getLogger("linspec")
_CONTEXT = 512


@dataclass(slots=True)
class Companion:
    """The heads in one folder of a model directory.

    facts: what drafter.json says. before, after: how often the likeliest guess of each head is the target's
    choice on the same held-out text, plain heads on the plain target and quantized ones on the quantized.
    """

    folder: Path
    heads: MedusaHeads
    facts: dict[str, Any]
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def measure(self, model: Decoder, stream: np.ndarray) -> None:
        """Count the right guesses of the plain heads."""
        self.before = _first_guesses(model, self.heads, stream)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"first_guess_before": self.before, "first_guess_after": self.after}


def find_companions(folder: Path, model: Decoder) -> list[Companion]:
    """The drafters in a plain model directory, checked and not measured yet.

    Raises DrafterError for one of another model and ConfigError for one that is quantized.
    """
    found = []
    for path in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        if is_leftover(path.parent.name):
            continue
        if (kind := kind_of(path.parent)) != MedusaHeads.kind:
            _log.warning(
                "%s stays behind: only Medusa heads are quantized with their model, and this is a drafter of "
                "kind %r; train one for the quantized model",
                path.parent,
                kind,
            )
            continue
        heads = load_heads(path.parent, model)
        if not isinstance(heads, MedusaHeads):
            raise ConfigError(
                f"{path.parent} is quantized already; quantize the one it was made from"
            )
        for name, tensor in heads.state_dict().items():
            check_finite(name, tensor, path.parent, DrafterError)
        found.append(Companion(path.parent, heads, read_drafter(path.parent, MedusaHeads.kind)))
    return found


def save_companion(
    companion: Companion, model: Decoder, out: Path, bits: int, stream: np.ndarray
) -> None:
    """Quantize the heads of a model that now is quantized, measure them, and write them into `out`."""
    companion.heads.bind(model)
    packed = PackedHeads.of(companion.heads, Quantizer(bits, {}))
    companion.after = _first_guesses(model, packed, stream)
    save_packed(packed, model, out / companion.folder.name, bits, companion.facts)


def _first_guesses(
    model: Decoder, heads: MedusaHeads | PackedHeads, stream: np.ndarray
) -> list[float]:
    context = min(_CONTEXT, model.config.position_limit or _CONTEXT)
    rates = calibrate(model, heads, stream, context=context, tokens=len(stream))
    return [row[0] for row in rates]
