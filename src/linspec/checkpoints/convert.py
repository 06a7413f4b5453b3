"""A model from a Hugging Face directory to a GGUF file, or back: `linspec convert A B`.

    convert("path/to/llama", "llama.gguf", kind="q8_0")
    convert("llama.gguf", "llama-again")

A GGUF file is written for llama.cpp and whatever reads its files. A directory is written for transformers,
with the values of the file as floats.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.config_file import ConfigFile, read_config_file
from linspec.checkpoints.dtype import pick_dtype
from linspec.checkpoints.gguf.model import load_gguf
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.gguf.writer import WRITTEN_BY, format_named, plan_file
from linspec.checkpoints.hub import load_model, load_tokenizer, resolve, save_model
from linspec.checkpoints.packages import PACKAGES
from linspec.checkpoints.weights import read_dtype, read_shapes, weight_files
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.models.config import DecoderConfig
from linspec.utils.places import FilePlace, Place, as_path
from linspec.utils.progress import Progress

KIND = "convert"


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written.

    Attributes:
        out: the file or directory.
        format: 'gguf' or 'huggingface'.
        tensors: how many tensors have each number format.
        megabytes: of what was written, 10⁶ bytes each.
    """

    out: str
    format: str
    tensors: dict[str, int]
    megabytes: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write a directory as a GGUF file, or a GGUF file as a directory; what `source` is decides which.

    Args:
        source: a Hugging Face directory, a GGUF file, or the name of a model.
        out: a new file called *.gguf, or a new directory.
        kind: how a GGUF file stores matrices: f16 (where None), q8_0, q4_0, bf16 or f32.
        dtype: of the weights in a directory: float32 (where None), bfloat16, float16 or float64.
        overwrite: replace what this function wrote to `out` before.

    Raises:
        ConfigError: `out` may not be written, or an option belongs to the other direction.
        UnsupportedModel: the other format cannot say what the model or its tokenizer does.
        CheckpointError: a file is missing or damaged, a weight is too large, or the disk refuses.
    """
    found, target = resolve(source), as_path(out)
    if is_gguf(found):
        return _to_directory(found, target, kind, dtype, overwrite)
    return _to_gguf(found, target, kind, dtype, overwrite)


def _to_gguf(
    folder: Path, out: Path, kind: str | None, dtype: object, overwrite: bool
) -> Converted:
    if dtype is not None:
        raise ConfigError("--dtype is for directories; a GGUF file takes --type")
    name = "f16" if kind is None else kind
    format_named(name)
    if out.suffix != ".gguf":
        raise ConfigError(
            f"{folder} is a directory, so {out} would be a GGUF file; call it {out.name or 'model'}.gguf"
        )
    place = FilePlace(out, KIND, _written_here, inputs=(folder,), overwrite=overwrite)
    place.check()
    read = read_config_file(folder)
    _check_plain(read)
    stored = read_dtype(weight_files(folder)) or torch.float32
    model = load_model(folder, dtype=stored)
    plan = plan_file(model, load_tokenizer(folder), name, folder)
    with place.replaced() as file, Progress(f"writing {out.name}", plan.values) as progress:
        plan.write(file, progress.update)
    return Converted(str(out), "gguf", plan.counts, out.stat().st_size / 1e6)


def _to_directory(
    file: Path, out: Path, kind: str | None, dtype: str | torch.dtype | None, overwrite: bool
) -> Converted:
    if kind is not None:
        raise ConfigError("--type is for GGUF files; a directory takes --dtype")
    if out.suffix == ".gguf":
        raise ConfigError(
            f"{file} is a GGUF file already; give the name of a directory, or change the number format with "
            "llama-quantize"
        )
    stored = pick_dtype("float32" if dtype is None else dtype, None, "cpu")
    place = Place(out, KIND, inputs=(file,), overwrite=overwrite)
    with place.held():
        tokenizer = load_tokenizer(file)
        with Progress(f"reading {file.name}", len(read_gguf(file).tensors)) as progress:
            model = load_gguf(file, stored, progress.update)
        package = next((each for each in PACKAGES.values() if each.path == file), None)
        notices = {} if package is None else {"NOTICE": package.notice + "\n"}
        save_model(model, tokenizer, place, stored, notices)
    files = weight_files(out)
    counts = {str(stored).removeprefix("torch."): len(read_shapes(files))}
    written = sum(each.stat().st_size for each in files)
    return Converted(str(out), "huggingface", counts, written / 1e6)


def _check_plain(read: ConfigFile) -> None:
    """Raise UnsupportedModel for models of linspec's own that no GGUF file can hold."""
    if read.delta is not None:
        raise UnsupportedModel(
            f"{read.folder} is a delta of another model, with mixers that a GGUF file has no tensors or keys "
            "for; convert the model that it belongs to"
        )
    if read.quantization is not None:
        raise UnsupportedModel(
            f"{read.folder} has weights of linspec's own integers, which a GGUF file cannot hold; convert "
            "the model that it was made from, with --type q8_0 or q4_0"
        )
    if not isinstance(read.config, DecoderConfig):
        raise UnsupportedModel(
            f"{read.folder} holds a model of kind {read.kind.name!r}; linspec writes decoders as GGUF only"
        )


def _written_here(path: Path) -> bool:
    try:
        return bool(read_gguf(path).keys.get(WRITTEN_BY) == KIND)
    except CheckpointError:
        return False
