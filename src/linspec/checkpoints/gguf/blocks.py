"""Weights of a GGUF file that stay in their blocks: which ones, and the layers that they become.

    kept = stored_rows(file, model, family, orders)     # names of ours: rows of the file's tensors
    model.to_inference(KeptBlocks.of(file, model, kept))

A matrix of ours is rows of one tensor of the file: all of them, some of a fused one, or in another
order, as llama's q and k are. Rows are whole blocks, so no value is touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from linspec.checkpoints.families.base import Family
from linspec.checkpoints.gguf.reader import AGAIN, GgufFile
from linspec.errors import CheckpointError
from linspec.kernels.cpu.blocks import pack_blocks
from linspec.kernels.cpu.library import load
from linspec.kernels.step_plan import BLOCKS
from linspec.mixers.projections import LinearFactory
from linspec.models.block_embedding import BlockEmbedding
from linspec.models.decoder import Decoder
from linspec.models.linear import fused_linear
from linspec.models.native_linear import NativeLinear
from linspec.quantization.blocks import BLOCK_FORMATS, TILE, BlockFormat

EMBEDDING = "embed.weight"
# layers that become one in the inference form
FUSED = (("q", "k", "v"), ("gate", "up"))


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A matrix of ours: the rows `order` of a tensor, in blocks of one format."""

    tensor: str
    kind: BlockFormat
    order: torch.Tensor
    inputs: int

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.kind.bytes_of(len(self.order), self.inputs)


def keepable(file: GgufFile) -> set[str]:
    """Tensors whose blocks the kernels multiply; none where these are missing."""
    if load().library is None:
        return set()
    return {
        name
        for name, info in file.tensors.items()
        if info.kind.name in BLOCK_FORMATS and len(info.shape) == 2
    }


def stored_rows(
    file: GgufFile,
    model: Decoder,
    family: Family,
    orders: Mapping[str, torch.Tensor],
) -> dict[str, StoredRows]:
    """The linear layers and embeddings of `model` that stay in blocks, by the names of their weights.

    orders: for each tensor of blocks, its rows in the order of ours.
    """
    names = sorted(orders)
    marked = {
        name: torch.stack((torch.full_like(orders[name], number), orders[name]), dim=1)
        for number, name in enumerate(names)
    }
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found: dict[str, StoredRows] = {}
    for ours, rows in family.to_ours(marked, model.config).items():
        if ours not in linear | {EMBEDDING}:
            continue
        tensor = names[int(rows[0, 0])]
        assert bool((rows[:, 0] == rows[0, 0]).all()), "rows of one matrix are of one tensor"
        info = file.tensors[tensor]
        kind = BLOCK_FORMATS[info.kind.name]
        found[ours] = StoredRows(tensor, kind, rows[:, 1].contiguous(), info.shape[-1])
    return found


def kept_whole(
    rows: Mapping[str, StoredRows], names: Collection[str], changed: Collection[str]
) -> dict[str, StoredRows]:
    """Those of `rows` that can stay in blocks if the weights `changed` become floats.

    names: all weights of the model. A tensor of the file stays whole or not at all, and so does what is
    multiplied as one matrix.
    """
    left = set(changed).intersection(rows)
    while True:
        tensors = {rows[name].tensor for name in left}
        more = {
            name
            for name in rows.keys() - left
            if rows[name].tensor in tensors
            or any(mate not in rows or mate in left for mate in _mates(name, names))
        }
        if not more:
            return {name: each for name, each in rows.items() if name not in left}
        left |= more


def _mates(name: str, names: Collection[str]) -> list[str]:
    """The weights that are multiplied together with `name`."""
    stem, _, part = name.removesuffix(".weight").rpartition(".")
    for group in FUSED:
        if part in group:
            mates = (f"{stem}.{each}.weight" for each in group)
            return [mate for mate in mates if mate in names]
    return []


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """A `LinearFactory` that makes layers of the blocks of a file, and of floats what has none."""

    file: GgufFile
    stored: Mapping[nn.Module, StoredRows] = field(repr=False)
    # makes layers of floats
    floats: LinearFactory = fused_linear
    # the parts of a fused tensor are asked for one after another
    _last: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        file: GgufFile,
        model: Decoder,
        stored: Mapping[str, StoredRows],
        floats: LinearFactory = fused_linear,
    ) -> KeptBlocks:
        """For a model whose kept weights have no memory yet."""
        layers = dict(model.named_modules(remove_duplicate=False))
        rows = {layers[name.removesuffix(".weight")]: each for name, each in stored.items()}
        if model.config.tied_embeddings and EMBEDDING in stored:
            rows[model.head] = stored[EMBEDDING]
        return cls(file, rows, floats)

    def __call__(self, *linears: nn.Module) -> nn.Module:
        parts = [self.stored[each] for each in linears if each in self.stored]
        if len(parts) == len(linears):
            return self.packed(parts, _joined_bias(linears))
        assert not parts, "what is multiplied as one matrix is all blocks or all floats"
        return self.floats(*linears)

    def packed(self, parts: list[StoredRows], bias: torch.Tensor | None = None) -> NativeLinear:
        """One layer of matrices that have the same inputs, one below the other."""
        sizes = [part.bytes for part in parts]
        whole, formats = torch.empty(sum(sizes), dtype=torch.uint8), list[tuple[int, int]]()
        for part, tiles in zip(parts, whole.split(sizes), strict=True):
            self._write(part, tiles)
            number, count = part.kind.number, len(part.order)
            if formats and formats[-1][0] == number and formats[-1][1] % TILE == 0:
                formats[-1] = (number, formats[-1][1] + count)
            else:
                formats.append((number, count))
        outputs = sum(len(part.order) for part in parts)
        return NativeLinear(
            BLOCKS, outputs, parts[0].inputs, whole, None, bias, parts=tuple(formats)
        )

    def embedding(self, model: Decoder) -> BlockEmbedding:
        """The table of tokens, which is the output layer where both are one."""
        head: nn.Module = model.head
        if model.config.tied_embeddings and isinstance(head, NativeLinear):
            return BlockEmbedding(head)
        return BlockEmbedding(self.packed([self.stored[model.embed]]))

    def _write(self, part: StoredRows, tiles: torch.Tensor) -> None:
        library = load().library
        assert library is not None
        if part.tensor not in self._last:
            self._last.clear()
            self._last[part.tensor] = torch.from_numpy(self.file.raw(part.tensor))
        raw = self._last[part.tensor]
        if not pack_blocks(library, part.kind, raw, part.order, part.inputs, tiles):
            raise CheckpointError(
                f"{self.file.path}: {part.tensor!r} holds NaN or infinity: it is damaged; {AGAIN}"
            )


def _joined_bias(linears: tuple[nn.Module, ...]) -> torch.Tensor | None:
    biases = [layer.bias for layer in linears if isinstance(layer, nn.Linear)]
    found = [bias.detach().float() for bias in biases if bias is not None]
    return torch.cat(found) if found else None
