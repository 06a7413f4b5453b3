"""In which precision a model computes and keeps its caches, by the names that users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.config_file import ConfigFile, read_config_file
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.origin import origin_of
from linspec.checkpoints.weights import read_dtype, weight_files
from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# of the entry of quantized directories
KEPT = "cache_dtype"
# other engines' names
_ALIASES = {"float": "float32", "half": "float16"}


def pick_dtype(dtype: str | torch.dtype, folder: Path | None, device: str) -> torch.dtype:
    """The precision for a name or a torch.dtype; raises ConfigError for one that cannot be.

    'auto' is that of the weights in `folder` on a GPU, bfloat16 for the blocks of a GGUF file, and float32 on
    a CPU, which linspec's own kernels compute in.
    """
    if dtype == "auto":
        plain = folder is None or torch.device(device).type == "cpu"
        return torch.float32 if plain or folder is None else _stored(folder)
    name = str(dtype).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if isinstance(dtype, str | torch.dtype) and name in DTYPES:
        return DTYPES[name]
    known = ("auto", *DTYPES)
    raise ConfigError(
        f"dtype must be one of {', '.join(known)} or a torch.dtype like these, got {shown(repr(dtype))}"
        f"{did_you_mean(name, known)}"
    )


def _stored(folder: Path) -> torch.dtype:
    read = read_config_file(folder)
    if read.delta is not None or is_gguf(folder):
        # what is made of blocks on a GPU; float16 would not hold every sum
        return torch.float32 if kept_dtype(read) is None else torch.bfloat16
    if read.quantization is not None:
        return torch.float32
    found = read_dtype(weight_files(folder))
    return torch.float32 if found is None or found not in DTYPES.values() else found


def kept_dtype(read: ConfigFile) -> torch.dtype | None:
    """The 16-bit floats that caches of the model in `read` keep by default: those that its weights have.

    float16 for a GGUF file, whose blocks have scales of that kind, and what is made of one; None for float32.
    """
    if read.delta is not None:
        return torch.float16
    if read.quantization is not None:
        found = DTYPES.get(str(dict(read.quantization).get(KEPT)))
    elif is_gguf(read.folder):
        kinds = {info.kind.name for info in read_gguf(read.folder).tensors.values()}
        found = torch.float16 if kinds != {"F32"} else None
    else:
        found = read_dtype(weight_files(read.folder))
    return found if found in _HALVES else None


def cache_kind(name: str, model: Any) -> str:
    """The spec of STATES for a `kv_cache_dtype`, where 'auto' is as the weights of `model` were stored.

    A model that computes in 16 bits keeps what it computes, and so does one in float64, which is asked for
    its precision.
    """
    return auto_kind(origin_of(model).kept, model) if name == "auto" else name


def auto_kind(kept: torch.dtype | None, model: Any) -> str:
    """The kind of `cache_kind` for weights that are stored as `kept` says."""
    if kept is None or model.dtype != torch.float32 or not model.keeps_cache:
        return "float"
    return _HALVES[kept]
