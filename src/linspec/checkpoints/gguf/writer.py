"""Writing a decoder as a GGUF file, with the container and the block formats of the package `gguf`.

    plan = plan_file(model, load_tokenizer(folder), "q8_0", folder)
    plan.write(file)

All that can be refused is refused while the plan is made, before a byte is written. Tensors are turned
into their format one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from linspec.checkpoints.gguf.config import EMBEDDING, HEAD
from linspec.checkpoints.gguf.model import names_of
from linspec.checkpoints.gguf.model_keys import (
    PlannedFile,
    architecture_for,
    check_said,
    model_keys,
    rope_factors,
)
from linspec.checkpoints.gguf.reader import TensorInfo
from linspec.checkpoints.gguf.tokenizer_keys import check_ids, tokenizer_keys
from linspec.checkpoints.gguf.types import TYPES
from linspec.checkpoints.matching import own_tensors
from linspec.errors import CheckpointError, ConfigError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.utils.messages import did_you_mean, shown

# set in files that this writer made, and by which command
WRITTEN_BY = "linspec.written_by"
POSITIONS = "position_embd.weight"


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store matrices. number: llama.cpp's for a whole file; largest: the greatest that fits."""

    kind: str
    number: int
    largest: float = float("inf")


# scales of blocks are float16: 127 steps of the largest one, or 8
FORMATS = {
    "f32": Format("F32", 0),
    "f16": Format("F16", 1, 65504.0),
    "bf16": Format("BF16", 32),
    "q8_0": Format("Q8_0", 7, 65504.0 * 127),
    "q4_0": Format("Q4_0", 2, 65504.0 * 8),
}
_LARGEST = {each.kind: each.largest for each in FORMATS.values()}
_NUMBERS = {each.name: number for number, each in TYPES.items()}


def format_named(name: object) -> Format:
    """The format with this name; raises ConfigError with the known ones."""
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    raise ConfigError(
        f"--type must be one of {', '.join(FORMATS)}, got {shown(repr(name))}{did_you_mean(name, FORMATS)}"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a file will hold: keys, and its tensors with their format and their order of rows."""

    keys: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    kinds: dict[str, str]
    config: DecoderConfig

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each format."""
        return dict(Counter(self.kinds.values()).most_common())

    @property
    def values(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def write(self, file: IO[bytes], watch: Callable[[int], None]) -> None:
        """Write the whole file; `watch` hears how many values are written so far."""
        from gguf import GGUFWriter
        from gguf.gguf_writer import WriterState

        writer = GGUFWriter(None, self.keys["general.architecture"])
        for name, value in self.keys.items():
            _add(writer, name, value)
        for name, tensor in self.tensors.items():
            self._announce(writer, name, tuple(tensor.shape))
        # the place is made by linspec, which puts it back on any failure
        writer.fout, writer.state = [file], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for name, tensor in self.tensors.items():
            writer.write_tensor_data(self._bytes(name))
            done += tensor.numel()
            watch(done)

    def _announce(self, writer: Any, name: str, shape: tuple[int, ...]) -> None:
        from gguf import GGMLQuantizationType

        kind, number = TYPES[_NUMBERS[self.kinds[name]]], _NUMBERS[self.kinds[name]]
        row = shape[-1] // kind.block * kind.bytes
        size = row * (int(np.prod(shape[:-1])) if len(shape) > 1 else 1)
        raw = (*shape[:-1], row)
        writer.add_tensor_info(name, raw, np.dtype(np.uint8), size, GGMLQuantizationType(number))

    def _bytes(self, name: str) -> np.ndarray:
        """A tensor in its format, with rows in llama.cpp's order."""
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        rows, kind = self.tensors[name].detach().float().cpu(), self.kinds[name]
        part = name.split(".")[-2]
        if architecture_for(self.config).pairs and part in ("attn_q", "attn_k"):
            rows = in_pairs(rows, self.config.heads if part == "attn_q" else self.config.kv_heads)
        found = quantize(rows.contiguous().numpy(), GGMLQuantizationType(_NUMBERS[kind]))
        return np.ascontiguousarray(found)


def plan_file(model: Decoder, tokenizer: Any, name: str, source: Path) -> Plan:
    """How `model` and `tokenizer` are written in the format `name`.

    Raises UnsupportedModel for what a GGUF file cannot say, and CheckpointError for weights that are not
    finite or too large for the format.
    """
    config = model.config
    chosen = format_named(name)
    keys = model_keys(config, source) | _general(source, chosen)
    factors = rope_factors(config)
    tensors = names_of(config, architecture_for(config)).to_theirs(own_tensors(model), config)
    tensors |= {name: torch.from_numpy(values) for name, values in factors.items()}
    kinds = {name: kind_of(name, tuple(t.shape), chosen) for name, t in tensors.items()}
    infos = {
        name: TensorInfo(name, tuple(tensor.shape), TYPES[_NUMBERS[kinds[name]]], 0)
        for name, tensor in tensors.items()
    }
    check_said(config, PlannedFile(source, keys, infos, factors), source)
    keys |= tokenizer_keys(tokenizer, config, source)
    check_ids(tokenizer.backend_tokenizer, PlannedFile(source, keys, infos, factors), source)
    for each, tensor in tensors.items():
        _check_range(each, tensor, kinds[each], source)
    return Plan(keys, tensors, kinds, config)


def kind_of(name: str, shape: tuple[int, ...], chosen: Format) -> str:
    """The format of one tensor: vectors stay floats, rows that make no whole blocks become float16.

    The embedding and the output matrix keep 8 bits in a 4-bit file: all errors pass through them.
    """
    if len(shape) == 1 or name == POSITIONS:
        return "F32"
    kind = "Q8_0" if chosen.kind == "Q4_0" and name in (EMBEDDING, HEAD) else chosen.kind
    return "F16" if shape[-1] % TYPES[_NUMBERS[kind]].block else kind


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from halves to interleaved pairs, head by head; also of a bias."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _general(source: Path, chosen: Format) -> dict[str, Any]:
    quantised = TYPES[_NUMBERS[chosen.kind]].block > 1
    return {
        "general.name": source.stem if source.suffix == ".gguf" else source.resolve().name,
        "general.file_type": chosen.number,
        **({"general.quantization_version": 2} if quantised else {}),
        WRITTEN_BY: "convert",
    }


def _check_range(name: str, tensor: torch.Tensor, kind: str, source: Path) -> None:
    least, most = (float(each) for each in torch.aminmax(tensor.detach()))
    largest = max(abs(least), abs(most))
    if not largest <= _LARGEST[kind]:
        raise CheckpointError(
            f"{source}: {name} has a weight of {largest:g}, and {kind} holds at most {_LARGEST[kind]:g}; "
            "give --type bf16 or f32, or look for damage with linspec verify --files"
        )


def _add(writer: Any, name: str, value: Any) -> None:
    """One key, in the type of number that llama.cpp reads."""
    if name == "general.architecture":
        # the writer has it already
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value.tolist() if isinstance(value, np.ndarray) else value)
