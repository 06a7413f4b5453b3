"""The weights of a GGUF file in a `Decoder`.

Tensors have llama.cpp's names. Llama's q and k rows lie in the order of interleaved rotary pairs and are
put back in halves; GPT-2's matrices are stored [out, in] already. Quantized tensors are dequantized, or stay
in their blocks (see blocks.py).
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from linspec.checkpoints.families.base import FAMILIES, Family
from linspec.checkpoints.gguf.architectures import Architecture, architecture_of
from linspec.checkpoints.gguf.blocks import (
    EMBEDDING,
    KeptBlocks,
    StoredRows,
    keepable,
    kept_whole,
    stored_rows,
)
from linspec.checkpoints.gguf.config import HEAD, read_config, tied
from linspec.checkpoints.gguf.keys import Keys
from linspec.checkpoints.gguf.reader import GgufFile, read_gguf
from linspec.checkpoints.gguf.ropes import ROPE_TENSORS
from linspec.checkpoints.gguf.types import FLOATS
from linspec.checkpoints.matching import fill, own_tensors
from linspec.checkpoints.origin import Origin, set_origin
from linspec.checkpoints.weights import cast
from linspec.errors import CheckpointError, ConfigError
from linspec.kernels.gpu.choice import multiplies_blocks
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import fused_linear, plain_linear
from linspec.models.memory import check_memory
from linspec.models.skeleton import without_memory

CPU = torch.device("cpu")
_log = logging.getLogger("linspec")


def load_gguf(
    path: Path,
    dtype: torch.dtype,
    watch: Callable[[int], None] = lambda done: None,
    *,
    keep_blocks: bool = False,
    change: Change | None = None,
    device: torch.device = CPU,
) -> Decoder:
    """The decoder in a GGUF file with weights in `dtype`, in evaluation mode.

    `watch` hears how many tensors are read so far. keep_blocks: matrices whose blocks the kernels can
    multiply stay as they are in the file; a model that has some is in its inference form. change: what
    becomes another model than that of the file. device: the model is to go there, and to be finalized there.
    Raises CheckpointError for a file that is damaged or does not hold what its keys promise.
    """
    kept = keep_blocks and multiplies_blocks(device, dtype)
    plan = plan_gguf(path, keep_blocks=kept, change=change)
    file, model = plan.file, plan.model
    check_memory(plan.bytes(dtype), path)
    found: dict[str, torch.Tensor] = {}
    for name in plan.as_floats:
        found[name] = _weight(file, name, model.config, plan.architecture, dtype)
        watch(len(found))
    fill(model, plan.family.to_ours(found, model.config), later=plan.kept)
    set_origin(model, Origin(stored_dtype(file), dtype))
    _tell(plan)
    model.eval()
    if change is not None:
        change.apply(model)
    if plan.kept:
        _keep(plan, device)
    return model


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to the model of a file: other mixers, and `apply`, which changes the layers `names`."""

    mixers: tuple[MixerConfig, ...]
    names: Collection[str]
    apply: Callable[[Decoder], Decoder]


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """What becomes of a file: the model, still without memory, and the matrices that stay in blocks."""

    file: GgufFile
    model: Decoder
    architecture: Architecture
    family: Family
    names: tuple[str, ...]
    kept: Mapping[str, StoredRows]

    @property
    def in_blocks(self) -> set[str]:
        """Tensors of the file that stay as they are."""
        return {each.tensor for each in self.kept.values()}

    @property
    def as_floats(self) -> list[str]:
        """The other tensors of the model."""
        blocks = self.in_blocks
        return [name for name in self.names if name not in blocks]

    def bytes(self, dtype: torch.dtype) -> int:
        """What the weights take in memory, floats of `dtype` among them."""
        infos = self.file.tensors
        floats = sum(infos[name].values for name in self.as_floats) * dtype.itemsize
        return floats + sum(each.bytes for each in self.kept.values())


def plan_gguf(path: Path, *, keep_blocks: bool, change: Change | None = None) -> GgufPlan:
    """Read what a file says of its model, and no weight; raises CheckpointError if it is damaged."""
    file = read_gguf(path)
    config = read_config(file)
    if change is not None:
        config = config.with_mixers(change.mixers)
    try:
        with without_memory():
            model = Decoder(config)
    except ConfigError as error:
        raise CheckpointError(f"cannot build the model of {path}: {error}") from error
    architecture = architecture_of(Keys(file))
    family = names_of(config, architecture)
    expected = family.to_theirs(own_tensors(model), config)
    _check(file, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    kept: dict[str, StoredRows] = {}
    if keep_blocks:
        rows = stored_rows(file, model, family, _orders(file, expected, config, architecture))
        changed = () if change is None else [f"{name}.weight" for name in change.names]
        kept = kept_whole(rows, own_tensors(model), changed)
    return GgufPlan(file, model, architecture, family, tuple(expected), kept)


def _orders(
    file: GgufFile, names: Iterable[str], config: DecoderConfig, architecture: Architecture
) -> dict[str, torch.Tensor]:
    """The rows of tensors of blocks in the order of ours."""
    return {
        name: _own_order(torch.arange(file.tensors[name].shape[0]), name, config, architecture)
        for name in keepable(file).intersection(names)
    }


def _keep(plan: GgufPlan, device: torch.device) -> None:
    """The inference form of a model whose kept weights are still to come."""
    floats = fused_linear if device.type == "cpu" else plain_linear
    factory = KeptBlocks.of(plan.file, plan.model, plan.kept, floats)
    plan.model.to_inference(factory)
    if EMBEDDING in plan.kept:
        plan.model.add_module("embed", factory.embedding(plan.model))
        plan.model.finalize_weights()


def names_of(config: DecoderConfig, architecture: Architecture) -> Family:
    """The model's Hugging Face family under the names that GGUF files give its tensors."""
    return replace(FAMILIES[config.family], prefix="", rules=architecture.rules)


def stored_dtype(file: GgufFile) -> torch.dtype:
    """The floats in which no value of the file is rounded; float32 for blocks."""
    kinds = {FLOATS.get(info.kind.name, torch.float32) for info in file.tensors.values()}
    return functools.reduce(torch.promote_types, kinds)


def quantized(file: GgufFile, names: Iterable[str] | None = None) -> dict[str, int]:
    """Formats of blocks among tensors of the file, and how many have each."""
    chosen = file.tensors.keys() if names is None else names
    counts = Counter(file.tensors[name].kind.name for name in chosen)
    return {name: count for name, count in counts.most_common() if name not in FLOATS}


def _tell(plan: GgufPlan) -> None:
    if formats := quantized(plan.file, plan.as_floats):
        said = ", ".join(f"{count} {name}" for name, count in formats.items())
        _log.info("%s: quantized tensors (%s) are computed with as floats", plan.file.path, said)


def _check(file: GgufFile, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless each tensor of the model is in the file, and no other."""
    extra = ROPE_TENSORS | ({HEAD} if tied(file) else set())
    missing, strange = expected.keys() - file.tensors, file.tensors.keys() - expected - extra
    for names, what in ((missing, "lacks"), (strange, "has what no such model has:")):
        if names:
            some = ", ".join(sorted(names)[:4])
            raise CheckpointError(
                f"{file.path} {what} {some}{', ...' if len(names) > 4 else ''} ({len(names)} tensors); "
                "it is of another kind than its keys say, or damaged"
            )
    for name, shape in expected.items():
        if file.tensors[name].shape != shape:
            raise CheckpointError(
                f"{file.path}: {name} has shape {list(file.tensors[name].shape)}, the keys of the file "
                f"ask for {list(shape)}; convert the model again"
            )


def _weight(
    file: GgufFile,
    name: str,
    config: DecoderConfig,
    architecture: Architecture,
    dtype: torch.dtype,
) -> torch.Tensor:
    found = file.read(name)
    part = name.split(".")[-2]
    if config.norm_offset and part.endswith("_norm"):
        # files have what is multiplied by, not what is added to 1
        found = found.float() - 1
    return _own_order(cast(found, dtype), name, config, architecture)


def _own_order(
    rows: torch.Tensor, name: str, config: DecoderConfig, architecture: Architecture
) -> torch.Tensor:
    """The rows of a tensor as ours are ordered."""
    part = name.split(".")[-2]
    if architecture.pairs and part in ("attn_q", "attn_k"):
        return in_halves(rows, config.heads if part == "attn_q" else config.kv_heads)
    return rows


def in_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from interleaved pairs to halves, head by head; also of a bias."""
    pairs = rows.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()
