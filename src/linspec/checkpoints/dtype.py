"""In which precision a model computes, by the names that users write."""

from __future__ import annotations

from pathlib import Path

import torch

from linspec.checkpoints.weights import read_dtype, weight_files
from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# other engines' names
_ALIASES = {"float": "float32", "half": "float16"}


def pick_dtype(dtype: str | torch.dtype, folder: Path | None, device: str) -> torch.dtype:
    """The precision for a name or a torch.dtype; raises ConfigError for one that cannot be.

    'auto' is that of the weights in `folder` on a GPU, and float32 on a CPU, which linspec's own kernels
    compute in.
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
    found = read_dtype(weight_files(folder))
    return torch.float32 if found is None or found not in DTYPES.values() else found
