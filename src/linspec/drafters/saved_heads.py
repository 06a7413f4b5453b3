"""Medusa heads and packed drafters on disk: drafter directories, as in `linspec.drafters.saved`.

Packed ones have an entry `quantization` in drafter.json, as quantized models have, and their weights are
mapped.

    heads = load_heads("model/medusa", model)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.quantized import ENTRY, check_entry, entry_of, map_tensors, write_aligned
from linspec.drafters.block_net import BlockNet
from linspec.drafters.heads import Heads, MedusaHeads
from linspec.drafters.packed import PackedHeads
from linspec.drafters.packed_block import PackedBlockNet
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
from linspec.drafters.trained import TrainedDrafter
from linspec.errors import CheckpointError, DrafterError
from linspec.mixers.projections import LinearFactory
from linspec.models.decoder import Decoder
from linspec.models.linear import Blank, Quantizer
from linspec.models.skeleton import without_memory
from linspec.utils.places import Place

Packed = PackedHeads | PackedBlockNet
T = TypeVar("T", bound=TrainedDrafter)
P = TypeVar("P", PackedHeads, PackedBlockNet)


def load_heads(source: str | Path, model: Decoder) -> Heads:
    """The heads in `source`, bound to `model`: in its dtype and on its device, or packed.

    Raises DrafterError when they were made for another model or are damaged.
    """
    folder = Path(source)
    data = read_drafter(folder, MedusaHeads.kind)
    if ENTRY not in data:
        return load_drafter(folder, model, MedusaHeads)
    return load_packed(folder, model, MedusaHeads, PackedHeads.of)


def load_packed(
    folder: Path, model: Decoder, kind: type[T], packed: Callable[[T, LinearFactory], P]
) -> P:
    """The packed form of a drafter of a `kind` in `folder`, mapped; `packed` makes it of a plain one.

    Raises DrafterError as `load_drafter` does.
    """
    data = read_drafter(folder, kind.kind)
    with without_memory():
        plain = kind.from_description(data, model, folder / CONFIG_FILE)
    check_target(data, model, folder)
    check_size_of_weights(folder)
    if model.device.type != "cpu":
        raise DrafterError(
            f"the drafter in {folder} is quantized, which is for the CPU; use the one it was made from"
        )
    try:
        bits = check_entry(data[ENTRY], folder)
    except CheckpointError as error:
        raise DrafterError(str(error)) from error
    with without_memory():
        drafter = packed(plain, Blank(bits))
    with named(folder):
        tensors = map_tensors(folder / WEIGHTS_FILE)
    load_weights(drafter, tensors, folder, exact=True)
    drafter.check_weights(folder / WEIGHTS_FILE)
    return drafter.requires_grad_(False).eval()


def pack_heads(
    heads: MedusaHeads, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]
) -> PackedHeads:
    """Write heads of a model that has been quantized since, packed too; see `Files`."""
    heads.bind(model)
    packed = PackedHeads.of(heads, Quantizer(bits, {}))
    save_packed(packed, model, out, bits, facts)
    return packed


def load_block(folder: Path, model: Decoder) -> BlockNet:
    """The block drafter in `folder`, packed where it was written so."""
    if ENTRY in read_drafter(folder, BlockNet.kind):
        return load_packed(folder, model, BlockNet, PackedBlockNet.of)
    return load_drafter(folder, model, BlockNet)


def pack_block(
    net: BlockNet, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]
) -> PackedBlockNet:
    """Write a block drafter of a model that has been quantized since, packed too; see `Files`."""
    net.bind(model)
    packed = PackedBlockNet.of(net, Quantizer(bits, {}))
    save_packed(packed, model, out, bits, facts, BlockNet.kind)
    return packed


def save_packed(
    drafter: Packed,
    model: Decoder,
    out: Path,
    bits: int,
    facts: Mapping[str, Any],
    kind: str = MedusaHeads.kind,
) -> Path:
    """Write a packed drafter of a kind, with weights of `bits` bits, to `out`, which must be new."""
    place = Place(out, "quantize")
    place.check()
    with place.replaced() as aside:
        write_aligned(drafter.state_dict(), aside / WEIGHTS_FILE)
        write_checksums(aside)
        facts = {**facts, ENTRY: entry_of(bits)}
        write_config(aside, kind, drafter.described(), model, facts)
    return out
