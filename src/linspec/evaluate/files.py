"""Whether the files of a model directory are the ones that were written, and sound.

    report = verify_files("student")
    print(report.tensors, report.checksums)

Loading a model checks names, shapes, dtypes and small tensors. This reads everything: checksums, every
value of every tensor, the drafters beside the model, the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.checksums import check_files
from linspec.checkpoints.hub import (
    check_tokenizer,
    load_any,
    load_tokenizer,
    resolve,
)
from linspec.checkpoints.load_tokenizer import TOKENIZER_FILES, tokenizer_place
from linspec.checkpoints.tensors import check_finite
from linspec.drafters.base import files_of
from linspec.drafters.saved import CONFIG_FILE, WEIGHTS_FILE
from linspec.errors import DrafterError
from linspec.kernels.cpu.structs import TILE
from linspec.kernels.step_plan import INT4
from linspec.models.decoder import Decoder
from linspec.models.native_linear import NativeLinear


@dataclass(frozen=True, slots=True)
class FilesReport:
    """What was read and found sound.

    tensors: how many, of the model and its drafters. checksums: by file, 'match' or 'none' where the
    directory has none. drafters: folders of trained drafters inside it.
    """

    model: str
    tensors: int
    checksums: dict[str, str]
    drafters: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"sound": True, **asdict(self)}


def verify_files(source: str | Path) -> FilesReport:
    """Read every file of a model directory and of the drafters in it.

    Raises CheckpointError or DrafterError, which name the first file that is damaged.
    """
    folder = resolve(source)
    sums = check_files(folder)
    model = load_any(folder)
    tensors = _all_finite(model, folder)
    place = tokenizer_place(folder)
    if place.is_file() or any((place / name).exists() for name in TOKENIZER_FILES):
        check_tokenizer(load_tokenizer(folder), model.config)
    drafters = []
    for path in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        inside = path.parent
        sums |= {f"{inside.name}/{name}": found for name, found in check_files(inside).items()}
        if not isinstance(model, Decoder):
            raise DrafterError(f"{inside} drafts for a decoder, and {folder} holds none; remove it")
        drafter = files_of(inside).load(inside, model)
        tensors += _all_finite(drafter, inside / WEIGHTS_FILE)
        drafters.append(inside.name)
    return FilesReport(str(source), tensors, sums, tuple(drafters))


def _all_finite(module: torch.nn.Module, path: Path) -> int:
    """The number of tensors, all of whose values are finite."""
    count = 0
    for name, tensor in (*module.state_dict().items(), *_packed_scales(module)):
        check_finite(name, tensor, path)
        count += 1
    return count


def _packed_scales(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The scales that lie between the codes of 4-bit weights."""
    for name, layer in module.named_modules():
        if isinstance(layer, NativeLinear) and layer.kind == INT4:
            packed = layer.get_buffer("packed")
            yield f"{name}.packed", packed[:, :, : 2 * TILE].contiguous().view(torch.bfloat16)
