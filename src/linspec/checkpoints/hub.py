"""Models on disk: ordinary Hugging Face directories, linspec's own and GGUF files, loaded and saved.

    model = load_model("path/to/llama")
    tokenizer = load_tokenizer("path/to/llama")
    save_model(model, tokenizer, Path("copy"), dtype=torch.bfloat16)

linspec's own format (see `config_file`) has weights under the model's own names. It is written only for
what no ordinary format can say. Nothing is downloaded, no pickle is opened and no code of a
checkpoint is run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.config_file import ConfigFile, config_file, read_config_file
from linspec.checkpoints.delta import load_delta, parse_delta
from linspec.checkpoints.dtype import kept_dtype
from linspec.checkpoints.families import known as families
from linspec.checkpoints.families.base import Family, Tensors
from linspec.checkpoints.gguf.model import load_gguf
from linspec.checkpoints.gguf.reader import is_gguf

# further names that callers import from here
from linspec.checkpoints.load_tokenizer import check_tokenizer as check_tokenizer
from linspec.checkpoints.load_tokenizer import load_tokenizer as load_tokenizer
from linspec.checkpoints.matching import fill, match, own_tensors
from linspec.checkpoints.origin import GENERATION, origin_of, remember_origin, set_origin
from linspec.checkpoints.quantized import load_quantized
from linspec.checkpoints.resolve import resolve as resolve
from linspec.checkpoints.weights import (
    SHARD_BYTES,
    cast,
    read_shapes,
    read_tensors,
    same_tensors,
    weight_files,
    write_tensors,
)
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.kernels.device import pick_device
from linspec.models.bert import Bert
from linspec.models.config import DecoderConfig, ModelConfig, Seq2SeqConfig
from linspec.models.decoder import Decoder
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.memory import check_memory
from linspec.models.model_types import MODEL_TYPES, M, Model
from linspec.models.skeleton import without_memory
from linspec.models.t5 import T5
from linspec.utils.places import Place, as_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("linspec")


def load_config(source: str | Path) -> DecoderConfig:
    """The configuration of a decoder's directory, without its weights."""
    read = read_config_file(resolve(source))
    _check_kind(read, Decoder)
    assert isinstance(read.config, DecoderConfig)
    return read.config


def load_any_config(source: str | Path) -> ModelConfig:
    """The configuration of whatever model is in `source`, without its weights."""
    return read_config_file(resolve(source)).config


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep_blocks: bool = False,
) -> Decoder:
    """The decoder in `source`, in evaluation mode.

    Args:
        source: a model directory, a GGUF file, or the name of an embedded or fetched model.
        dtype: of the weights in memory.
        device: where the weights go.
        keep_blocks: weights that a GGUF file has in blocks stay in them where linspec's own kernels run:
            in float32 on the CPU, and on a device where `LINSPEC_TRITON` is 'on'. Such a model is in its
            inference form.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others.
        UnsupportedModel: the checkpoint is sound, but its kind or family does not fit.
    """
    return _load(read_config_file(resolve(source)), Decoder, dtype, device, keep_blocks)


def load_encoder(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Bert:
    """The encoder in `source` with its heads, in evaluation mode; raises like `load_model`."""
    return _load(read_config_file(resolve(source)), Bert, dtype, device)


def load_seq2seq(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> T5:
    """The encoder-decoder in `source`, in evaluation mode; raises like `load_model`."""
    return _load(read_config_file(resolve(source)), T5, dtype, device)


def load_diffusion(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> MaskedDiffusion:
    """The masked-diffusion model in `source`, in evaluation mode; raises like `load_model`."""
    return _load(read_config_file(resolve(source)), MaskedDiffusion, dtype, device)


def load_decoder(source: str | Path, *, keep_blocks: bool = False, **options: Any) -> Decoder:
    """The decoder in `source`, causal or not; arguments and errors are those of `load_model`."""
    if read_config_file(resolve(source)).kind.model is MaskedDiffusion:
        # no file has it in blocks
        return load_diffusion(source, **options)
    return load_model(source, keep_blocks=keep_blocks, **options)


def load_causal_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep_blocks: bool = False,
) -> Decoder | T5:
    """Whatever in `source` generates text, in evaluation mode; raises like `load_model`."""
    read = read_config_file(resolve(source))
    if read.kind.loop is None:
        raise UnsupportedModel(
            f"{read.folder} holds an encoder, which generates nothing; load_encoder reads it"
        )
    if read.kind.model is T5:
        return _load(read, T5, dtype, device)
    if read.kind.model is MaskedDiffusion:
        return _load(read, MaskedDiffusion, dtype, device)
    return _load(read, Decoder, dtype, device, keep_blocks)


def load(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Decoder | T5, PreTrainedTokenizerBase]:
    """The decoder or encoder-decoder in `source`, as plain torch modules, and its tokenizer.

    `LLM` is the way to text. Arguments and errors are those of `load_model`; an encoder raises
    UnsupportedModel.
    """
    return load_causal_model(source, dtype=dtype, device=device), load_tokenizer(source)


def load_any(source: str | Path) -> Model:
    """Whatever model is in `source`, in float32 on the CPU; raises like `load_model`."""
    read = read_config_file(resolve(source))
    model: type[Model] = read.kind.model
    return _load(read, model, torch.float32, "cpu")


def _load(
    read: ConfigFile,
    wanted: type[M],
    dtype: torch.dtype,
    device: torch.device | str,
    keep_blocks: bool = False,
) -> M:
    """The model that was described, if it is one of those that are wanted."""
    if not isinstance(device, torch.device):
        device = pick_device(device)
    _check_kind(read, wanted)
    kept: Any = {"keep_blocks": keep_blocks, "device": torch.device(device)}
    if read.delta is not None and isinstance(read.config, DecoderConfig):
        delta = parse_delta(read.delta, read.folder / "config.json")
        found: Model = load_delta(read.folder, read.config, delta, dtype, **kept)
    elif read.quantization is not None and isinstance(read.config, DecoderConfig):
        found = _load_quantized(read, read.config, dtype, device)
    elif is_gguf(read.folder):
        found = load_gguf(read.folder, dtype, **kept)
    else:
        found = _load_plain(read, dtype)
    _move(found, device, read.folder)
    set_origin(found, replace(origin_of(found), kept=kept_dtype(read)))
    assert isinstance(found, wanted)
    if isinstance(found.config, DecoderConfig) and (note := found.config.rope.note):
        _log.warning("%s: %s", read.folder, note)
    return found


def _move(model: Model, device: torch.device | str, folder: Path) -> None:
    """To a device, in place; raises CheckpointError where it has no room."""
    if torch.device(device).type != "cpu":
        check_memory(sum(each.nbytes for each in model.parameters()), folder, device)
        model.to(device)
        if isinstance(model, Decoder) and model.is_inference:
            # what was computed of the weights lies with them, and what runs a step is another kernel
            model.finalize_weights()


def _load_plain(read: ConfigFile, dtype: torch.dtype) -> Model:
    folder, config, family = read.folder, read.config, read.family
    files = weight_files(folder)
    shapes = read_shapes(files)
    if family is not None:
        config = family.adapt(config, shapes.keys())
        config = _with_own_head(config, family, files, shapes)
    model = _skeleton(config, read.kind.model, folder)
    expected = own_tensors(model)
    if family is not None:
        expected = family.to_theirs(expected, config)
    names = match(expected, shapes, family, folder)
    check_memory(sum(t.numel() for t in expected.values()) * dtype.itemsize, folder)
    tensors = read_tensors(files, names, expected, dtype)
    if family is not None:
        tensors = family.to_ours(tensors, config)
    fill(model, tensors)
    remember_origin(model, folder, files, dtype)
    return model.eval()


def _with_own_head(
    config: ModelConfig, family: Family, files: list[Path], shapes: Mapping[str, Any]
) -> ModelConfig:
    """The configuration, untied where the file has an output matrix that is not the embedding."""
    decoder = config.decoder if isinstance(config, Seq2SeqConfig) else config
    if not isinstance(decoder, DecoderConfig) or not decoder.tied_embeddings:
        return config
    embedding = next((rule.theirs for rule in family.rules if rule.ours[0].endswith("embed")), "")
    head = (
        next((rule.theirs for rule in family.rules if rule.ours[0].endswith("head")), "")
        + ".weight"
    )
    names = [f"{embedding}.weight", f"{embedding.removeprefix(family.prefix)}.weight"]
    tied = [name for name in names if name in shapes]
    if head not in shapes or not tied or same_tensors(files, head, tied[0]):
        return config
    decoder = replace(decoder, tied_embeddings=False)
    return replace(config, decoder=decoder) if isinstance(config, Seq2SeqConfig) else decoder


def _check_kind(read: ConfigFile, model: type[M]) -> None:
    """Raise UnsupportedModel for a model of another kind than the one whose class is wanted."""
    kind, wanted = read.kind, next(each for each in MODEL_TYPES.values() if each.model is model)
    # several kinds have one loader, whose callers need nothing more of them
    if kind.loader == wanted.loader:
        return
    raise UnsupportedModel(
        f"{read.folder} holds a model of kind {kind.name!r} (family {read.config.family}), which "
        f"{wanted.loader} does not read: it wants kind {wanted.name!r}. Use {kind.loader}"
    )


def _load_quantized(
    read: ConfigFile, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str
) -> Decoder:
    if torch.device(device).type != "cpu" or dtype != torch.float32:
        raise ConfigError(
            f"{read.folder} is quantized: it runs on the CPU and computes in float32, not on {device} in "
            f"{dtype}; use the model that it was made from"
        )
    return load_quantized(read.folder, config, read.quantization)


def with_tokenizer(
    model: str | Path | Decoder, tokenizer: Any = None, *, device: str = "cpu"
) -> tuple[Decoder, Any]:
    """A decoder and its tokenizer, both loaded where `model` is a source; see `check_tokenizer`."""
    if isinstance(model, str | Path):
        tokenizer = tokenizer or load_tokenizer(model)
        model = load_model(model, device=device)
    check_tokenizer(tokenizer, model.config)
    return model, tokenizer


def save_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | Path | Place,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, str] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a model directory and return its path.

    The directory is an ordinary Hugging Face directory if the family of the model can say all of it, else
    one of linspec's own format. It keeps the sampling defaults of the checkpoint that the model was loaded
    from. A failure while it is written, Ctrl-C included, leaves `out` as it was.

    Args:
        model: a decoder, encoder or encoder-decoder that is not in its inference form.
        tokenizer: saved beside the model; None saves none.
        out: a directory that is new or empty, or a Place that the caller holds.
        dtype: of the saved weights; None takes that of the checkpoint, unless the model was converted.
        extra_files: texts by file name, saved beside the model.
        shard_bytes: most bytes of one file of weights.
        overwrite: replace a model that this function wrote to `out` before.

    Raises:
        ConfigError: `out` may not be written.
        CheckpointError: the disk refuses.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config)
    if not isinstance(out, Place):
        place = Place(as_path(out), "save_model", overwrite=overwrite)
        with place.held():
            return save_model(model, tokenizer, place, dtype, extra_files, shard_bytes=shard_bytes)
    family = families.family_of(model.config, own_tensors(model))
    origin = origin_of(model)
    dtype = dtype or origin.dtype_to_save(own_tensors(model))
    tensors = {name: cast(tensor, dtype) for name, tensor in own_tensors(model).items()}
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    config = config_file(model.config, family) | {"dtype": _dtype_name(tensors)}
    with out.replaced() as aside:
        named = tensors if family is None else family.on_disk(tensors, model.config)
        write_tensors(named, aside, shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        _write_json(aside / GENERATION, {**origin.generation, **model.config.token_ids()})
        write_checksums(aside)
        for name, text in (extra_files or {}).items():
            (aside / name).write_text(text, encoding="utf-8")
        _write_json(aside / "config.json", config)
    return out.path


def _skeleton(config: ModelConfig, model: Callable[[Any], Model], folder: Path) -> Model:
    """The model without memory for its weights."""
    try:
        with without_memory():
            return model(config)
    except ConfigError as error:
        raise CheckpointError(f"cannot build the model of {folder}: {error}") from error


def _dtype_name(tensors: Tensors) -> str:
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
