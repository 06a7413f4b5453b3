"""Medusa heads on disk: a drafter directory, as in `linspec.drafters.saved`.

Packed heads have an entry `quantization` in drafter.json, as quantized models have, and their weights are
mapped.

    heads = load_heads("model/medusa", model)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.quantized import ENTRY, check_entry, entry_of, map_tensors, write_aligned
from linspec.drafters.heads import Heads, MedusaHeads
from linspec.drafters.packed import PackedHeads
from linspec.drafters.saved import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_size_of_weights,
    check_target,
    load_drafter,
    load_weights,
    named,
    read_drafter,
    write_config,
)
from linspec.errors import CheckpointError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.linear import Blank
from linspec.models.skeleton import without_memory
from linspec.utils.places import Place


def load_heads(source: str | Path, model: Decoder) -> Heads:
    """The heads in `source`, bound to `model`: in its dtype and on its device, or packed.

    Raises DrafterError when they were made for another model or are damaged.
    """
    folder = Path(source)
    data = read_drafter(folder, MedusaHeads.kind)
    if ENTRY not in data:
        return load_drafter(folder, model, MedusaHeads)
    with without_memory():
        plain = MedusaHeads.from_description(data, model, folder / CONFIG_FILE)
    check_target(data, model, folder)
    check_size_of_weights(folder)
    return _load_packed(plain, data[ENTRY], model, folder)


def _load_packed(plain: MedusaHeads, entry: Any, model: Decoder, folder: Path) -> PackedHeads:
    """Packed heads of the shape of `plain`, mapped."""
    if model.device.type != "cpu":
        raise DrafterError(
            f"the drafter in {folder} is quantized, which is for the CPU; use the one it was made from"
        )
    try:
        bits = check_entry(entry, folder)
    except CheckpointError as error:
        raise DrafterError(str(error)) from error
    with without_memory():
        heads = PackedHeads.of(plain, Blank(bits))
    with named(folder):
        tensors = map_tensors(folder / WEIGHTS_FILE)
    load_weights(heads, tensors, folder, exact=True)
    heads.check_weights(folder / WEIGHTS_FILE)
    return heads.requires_grad_(False).eval()


def save_packed(
    heads: PackedHeads, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]
) -> Path:
    """Write packed heads with weights of `bits` bits to `out`, which must be new."""
    place = Place(out, "quantize")
    place.check()
    with place.replaced() as aside:
        write_aligned(heads.state_dict(), aside / WEIGHTS_FILE)
        write_checksums(aside)
        facts = {**facts, ENTRY: entry_of(bits)}
        write_config(aside, MedusaHeads.kind, heads.described(), model, facts)
    return out
