"""EAGLE-style drafters on disk: a drafter directory, as in `linspec.drafters.saved`, plain or packed.

A packed one has an entry `quantization` in drafter.json, as quantized models have; its weights are mapped.

    net = load_eagle("model/eagle", model)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.quantized import ENTRY, check_entry, entry_of, map_tensors, write_aligned
from linspec.drafters.eagle_net import EagleNet
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
from linspec.models.linear import Blank, Quantizer
from linspec.models.skeleton import without_memory
from linspec.utils.places import Place


def load_eagle(source: str | Path, model: Decoder) -> EagleNet:
    """The drafter in `source`, for `model`; raises DrafterError when it is for another one or damaged."""
    folder = Path(source)
    data = read_drafter(folder, EagleNet.kind)
    if ENTRY not in data:
        return load_drafter(folder, model, EagleNet)
    if model.device.type != "cpu":
        raise DrafterError(
            f"the drafter in {folder} is quantized, which is for the CPU; use the one it was made from"
        )
    try:
        bits = check_entry(data[ENTRY], folder)
    except CheckpointError as error:
        raise DrafterError(str(error)) from error
    with without_memory():
        net = EagleNet.from_description(data, model, folder / CONFIG_FILE)
        net.to_inference(Blank(bits))
    check_target(data, model, folder)
    check_size_of_weights(folder)
    with named(folder):
        tensors = map_tensors(folder / WEIGHTS_FILE)
    load_weights(net, tensors, folder, exact=True)
    net.check_weights(folder / WEIGHTS_FILE)
    return net.requires_grad_(False).eval()


def pack_eagle(
    net: EagleNet, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]
) -> EagleNet:
    """Write a drafter of a model that has been quantized since, packed too; see `Files`."""
    packed = net.to_inference(Quantizer(bits, {}))
    save_packed_eagle(packed, model, out, bits, facts)
    return packed


def save_packed_eagle(
    net: EagleNet, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]
) -> Path:
    """Write a drafter in its inference form, with weights of `bits` bits, to `out`, which must be new."""
    place = Place(out, "quantize")
    place.check()
    with place.replaced() as aside:
        write_aligned(net.state_dict(), aside / WEIGHTS_FILE)
        write_checksums(aside)
        facts = {**facts, ENTRY: entry_of(bits)}
        write_config(aside, EagleNet.kind, net.described(), model, facts)
    return out
