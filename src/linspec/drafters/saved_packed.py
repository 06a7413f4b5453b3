"""Packed drafters on disk: drafter directories as in `linspec.drafters.saved`, with weights of few bits.

They have an entry `quantization` in drafter.json, as quantized models have, and their weights are mapped.

    HEADS = Packable(MedusaHeads, PackedHeads.of)
    heads = HEADS.load("model/medusa", model)        # packed where they were written so
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.quantized import ENTRY, check_entry, entry_of, map_tensors, write_aligned
from linspec.drafters.block_net import BlockNet
from linspec.drafters.eagle_net import EagleNet
from linspec.drafters.heads import MedusaHeads
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

T = TypeVar("T", bound=TrainedDrafter)
P = TypeVar("P", PackedHeads, PackedBlockNet, EagleNet)


@dataclass(frozen=True)
class Packable(Generic[T, P]):
    """A kind of drafter, and what makes its packed form of a plain one.

    plain: the other way round, for devices where packed layers do not run; None where there is no such way.
    """

    kind: type[T]
    packed: Callable[[T, LinearFactory], P]
    plain: Callable[[P], T] | None = None

    def load(self, source: str | Path, model: Decoder) -> T | P:
        """The drafter in `source`, for `model`: in its dtype and on its device, or packed on a CPU.

        Raises DrafterError when it was made for another model, is of another kind or is damaged.
        """
        folder = Path(source)
        data = read_drafter(folder, self.kind.kind)
        if ENTRY not in data:
            return load_drafter(folder, model, self.kind)
        with without_memory():
            plain = self.kind.from_description(data, model, folder / CONFIG_FILE)
        check_target(data, model, folder)
        check_size_of_weights(folder)
        if self.plain is None:
            _check_cpu(model, folder)
        bits = _bits(data[ENTRY], folder)
        with without_memory():
            drafter = self.packed(plain, Blank(bits))
        with named(folder):
            tensors = map_tensors(folder / WEIGHTS_FILE)
        load_weights(drafter, tensors, folder, exact=True)
        drafter.check_weights(folder / WEIGHTS_FILE)
        if self.plain is not None and model.device.type != "cpu":
            return self.plain(drafter).to(model.device, model.dtype)
        return drafter.requires_grad_(False).eval()

    def pack(self, drafter: T, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]) -> P:
        """Write a drafter of a model that has been quantized since, packed too; see `Files`."""
        drafter.bind(model)
        packed = self.packed(drafter, Quantizer(bits, {}))
        self.save(packed, model, out, bits, facts)
        return packed

    def save(
        self, packed: P, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]
    ) -> Path:
        """Write a packed drafter, with weights of `bits` bits, to `out`, which must be new."""
        place = Place(out, "quantize")
        place.check()
        with place.replaced() as aside:
            write_aligned(packed.state_dict(), aside / WEIGHTS_FILE)
            write_checksums(aside)
            facts = {**facts, ENTRY: entry_of(bits)}
            write_config(aside, self.kind.kind, packed.described(), model, facts)
        return out


def _check_cpu(model: Decoder, folder: Path) -> None:
    if model.device.type != "cpu":
        raise DrafterError(
            f"the drafter in {folder} is quantized, which is for the CPU; use the one it was made from"
        )


def _bits(entry: Any, folder: Path) -> int:
    """Of the weights, by the entry of drafter.json; raises DrafterError where it is no such entry."""
    try:
        return check_entry(entry, folder)
    except CheckpointError as error:
        raise DrafterError(str(error)) from error


HEADS = Packable(MedusaHeads, PackedHeads.of, PackedHeads.plain)
BLOCK = Packable(BlockNet, PackedBlockNet.of)
EAGLE = Packable(EagleNet, EagleNet.to_inference)
