"""The border for the state of an interrupted run: what is resumed is what was saved, or a named error.

meta, tensors = read_state(out / "training" / "finetune", trainer.named)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from linspec.checkpoints.tensors import check_finite, check_tensors
from linspec.errors import ConfigError, TrainingError
from linspec.utils.border import parse, read_json
from linspec.utils.sizes import check_sizes

META_FILE, TENSORS_FILE = "state.json", "state.safetensors"
_WEIGHT = "weight."
_MOMENT = re.compile(r"moment\.\d+\.\d+\.\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run had come."""

    step: int
    tokens: int
    seconds: float
    log: list[dict[str, float | bool]]
    config: dict[str, Any]
    precision: str | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "step", least=0)


def read_state(
    folder: Path, named: Mapping[str, torch.Tensor]
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """How far the run in `folder` had come, and its tensors, whose weights fit those of `named`.

    Raises TrainingError when a file is damaged or belongs to another run.
    """
    path = folder / TENSORS_FILE
    again = "run without --resume to begin again"
    try:
        meta = parse(Progress, read_json(folder / META_FILE, TrainingError), folder / META_FILE)
        tensors = load_file(path)
    except (ConfigError, SafetensorError, OSError) as error:
        raise TrainingError(f"the state in {folder} is damaged: {error}; {again}") from error
    weights = {
        name.removeprefix(_WEIGHT): tensor
        for name, tensor in tensors.items()
        if name.startswith(_WEIGHT)
    }
    if weights.keys() != named.keys():
        raise TrainingError(f"{folder} belongs to another model or recipe; use another --out")
    check_tensors(weights, named, path, error=TrainingError)
    shapes = {tuple(weight.shape) for weight in named.values()} | {()}
    for name, tensor in tensors.items():
        moment = _MOMENT.fullmatch(name) and tuple(tensor.shape) in shapes
        if not name.startswith(_WEIGHT) and not moment:
            raise TrainingError(f"{path} holds {name}, which belongs to no weight; {again}")
        check_finite(name, tensor, path, TrainingError)
    return meta, tensors
