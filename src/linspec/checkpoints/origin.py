"""Where a model was loaded from, as far as saving it again keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.checkpoints.weights import read_dtype
from linspec.utils.border import read_json

GENERATION = "generation_config.json"
_FIELD = "origin"


@dataclass(frozen=True, slots=True)
class Origin:
    """dtype: of the weights on disk; loaded: what they were turned into; generation: defaults beside them.

    kept: the 16-bit floats that caches keep unless they are asked otherwise (see `dtype.py`), None for none.
    """

    dtype: torch.dtype | None = None
    loaded: torch.dtype | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    kept: torch.dtype | None = None

    def dtype_to_save(self, tensors: Mapping[str, torch.Tensor]) -> torch.dtype | None:
        """That of the file, unless the model was turned into another one since; None keeps tensors."""
        now = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        return self.dtype if now == {self.loaded} else None


def remember_origin(model: nn.Module, folder: Path, files: list[Path], loaded: torch.dtype) -> None:
    """Note where `model` comes from."""
    path = folder / GENERATION
    generation = read_json(path) if path.exists() else {}
    set_origin(model, Origin(read_dtype(files), loaded, generation))


def set_origin(model: nn.Module, origin: Origin) -> None:
    """Note where `model` comes from, where that is no directory."""
    model.__dict__[_FIELD] = origin


def origin_of(model: nn.Module) -> Origin:
    """What is known of where `model`, or the one that it was made from, was loaded."""
    found = model.__dict__.get(_FIELD)
    return found if isinstance(found, Origin) else Origin()


def share_origin(source: nn.Module, target: nn.Module) -> None:
    """`target` is saved like `source`."""
    set_origin(target, origin_of(source))
