"""Quantized model directories: weights as the kernels read them, mapped into memory, never copied.

The weights lie in one safetensors file whose tensors begin at multiples of 64 bytes. `config.json` has
the entry `quantization` with the version of this format, so that a directory of another version is
refused by name. Loading maps the file: pages are read when a step first needs them, and a process
needs no memory beside the file's own pages.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.config_file import QUANTIZATION, config_file
from linspec.checkpoints.dtype import KEPT
from linspec.checkpoints.origin import origin_of
from linspec.checkpoints.tensors import check_tensors
from linspec.checkpoints.weights import SINGLE
from linspec.errors import CheckpointError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import Blank
from linspec.models.memory import check_memory
from linspec.models.model_types import of_config
from linspec.models.skeleton import without_memory
from linspec.quantization.codes import BITS
from linspec.utils.places import Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENTRY = QUANTIZATION
FORMAT = 1
_ALIGNMENT = 64
# as safetensors itself limits it
_LONGEST_HEADER = 100_000_000
_UNSOUND = (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "I32": torch.int32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@contextlib.contextmanager
def save_quantized(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    out: Path | Place,
    bits: int,
    facts: Mapping[str, Any],
) -> Iterator[Path]:
    """Write a quantized model to `out`; inside the block more files can be laid beside it.

    `facts` go into the configuration. `out` must be new or empty, or a Place that the caller holds.
    All or nothing: it is there when the block ends. Raises ConfigError when `out` may not be written,
    CheckpointError when the disk refuses.
    """
    if not isinstance(out, Place):
        place = Place(out, "quantize")
        with place.held(), save_quantized(model, tokenizer, place, bits, facts) as aside:
            yield aside
        return
    kept = origin_of(model).kept
    known = {"identity": model.identity, "weight_identity": model.weight_identity}
    entry = {**entry_of(bits), **known, **facts}
    if kept is not None:
        entry[KEPT] = str(kept).removeprefix("torch.")
    config = config_file(model.config, None) | {"dtype": "float32", ENTRY: entry}
    with out.replaced() as aside:
        write_aligned(dict(model.state_dict()), aside / SINGLE)
        write_checksums(aside)
        tokenizer.save_pretrained(aside)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        yield aside


def load_quantized(folder: Path, config: DecoderConfig, entry: Any) -> Decoder:
    """The model that `save_quantized` wrote; raises CheckpointError for another version or bad files."""
    bits = check_entry(entry, folder)
    path = folder / SINGLE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy or download it again")
    check_memory(path.stat().st_size, folder)
    with without_memory():
        kind: Any = of_config(config).model
        model: Decoder = kind(config).eval().to_inference(Blank(bits))
        # as they are saved, whatever they are trained in
        model.embed.to(torch.bfloat16)
    tensors = map_tensors(path)
    check_tensors(tensors, model.state_dict(), path)
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    model.identity = str(entry.get("identity"))
    # files of older versions do not say it
    known = entry.get("weight_identity")
    model.weight_identity = known if isinstance(known, str) else None
    model.finalize_weights()
    return model


def entry_of(bits: int) -> dict[str, Any]:
    """What a configuration says about quantized weights beside it."""
    return {"format": FORMAT, "bits": bits}


def check_entry(entry: Any, folder: Path) -> int:
    """The bits of quantized weights; raises CheckpointError for those of another version."""
    version = entry.get("format") if isinstance(entry, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} holds quantized weights of format {version}, this linspec reads format {FORMAT}; "
            "quantize the original model again with `linspec quantize`, or use the linspec that wrote it"
        )
    bits = entry.get("bits")
    if not isinstance(bits, int) or bits not in BITS:
        raise CheckpointError(f"{folder} has weights of {bits} bits; known: 8 and 4")
    return bits


def write_aligned(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file whose tensors begin at multiples of 64 bytes of the file."""
    header: dict[str, Any] = {}
    end = 0
    # the format allows no holes: tensors of whole lines first, so that all of these are aligned
    for name in sorted(tensors, key=lambda name: tensors[name].nbytes % _ALIGNMENT != 0):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        kind, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().tobytes())


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file as views of the mapped file; raises CheckpointError."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST_HEADER):
                raise ValueError("the header is longer than the file or than 100 MB")
            header = json.loads(file.read(length))
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        data = whole[8 + length :]
        header.pop("__metadata__", None)
        return {name: _view(data, entry) for name, entry in header.items()}
    # RuntimeError: torch's, for shapes that are no sizes
    except (*_UNSOUND, RecursionError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}); copy or download it again"
        ) from error


def _view(data: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("offsets and shapes must be whole numbers of 0 or more")
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor does not fit into the file")
    part = data[begin:end]
    if part.data_ptr() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)
