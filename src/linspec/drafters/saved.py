"""Trained drafters on disk: a directory with `drafter.json` and `drafter.safetensors`.

drafter.json holds the kind, what the drafter says of itself, and the fingerprints of its targets.

    save_drafter(drafter, model, "model/eagle")
    drafter = load_drafter("model/eagle", model, EagleNet)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.tensors import aligned, check_tensors
from linspec.drafters.trained import Files, TrainedDrafter
from linspec.errors import CheckpointError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.memory import check_memory
from linspec.models.skeleton import without_memory
from linspec.utils.border import check_files, read_json
from linspec.utils.format_version import CURRENT, KEY, check_format
from linspec.utils.messages import shown
from linspec.utils.places import Place, as_path

CONFIG_FILE, WEIGHTS_FILE = "drafter.json", "drafter.safetensors"

T = TypeVar("T", bound=TrainedDrafter)


def save_drafter(
    drafter: TrainedDrafter,
    model: Decoder,
    out: str | Path | Place,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a drafter of `model` to the directory `out`; returns it.

    `dtype` converts the weights, None keeps them; `facts` are added to drafter.json. `out`,
    `overwrite`: see `save_model`. Raises ConfigError when `out` may not be written, CheckpointError
    when the disk refuses; `out` then stays as it was.
    """
    if not isinstance(out, Place):
        place = Place(as_path(out), "save_drafter", overwrite=overwrite)
        with place.held():
            return save_drafter(drafter, model, place, dtype=dtype, facts=facts)
    tensors = {
        name: tensor.detach().cpu().to(_kept(tensor, dtype)).contiguous()
        for name, tensor in drafter.state_dict().items()
    }
    with out.replaced() as aside:
        save_file(tensors, aside / WEIGHTS_FILE)
        write_checksums(aside)
        write_config(aside, drafter.kind, drafter.described(), model, facts or {})
    return out.path


def _kept(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is written as: token ids stay whole numbers."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def write_config(
    folder: Path, kind: str, described: Mapping[str, Any], model: Decoder, facts: Mapping[str, Any]
) -> None:
    """Write the drafter.json of a drafter of `model`; `facts` stand behind what it says of itself."""
    config = {KEY: CURRENT, "kind": kind, **described, "target": fingerprint(model)}
    text = json.dumps(config | {k: v for k, v in facts.items() if k not in config}, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_drafter(source: str | Path, model: Decoder, kind: type[T]) -> T:
    """The drafter in `source`, for `model`: in its dtype and on its device.

    Raises DrafterError when it was made for another model, is of another kind or is damaged.
    """
    folder = Path(source)
    data = read_drafter(folder, kind.kind)
    with without_memory():
        drafter = kind.from_description(data, model, folder / CONFIG_FILE)
    check_target(data, model, folder)
    check_size_of_weights(folder)
    with named(folder):
        read = load_file(folder / WEIGHTS_FILE)
        tensors = {name: aligned(tensor) for name, tensor in read.items()}
    load_weights(drafter, tensors, folder)
    drafter.check_weights(folder / WEIGHTS_FILE)
    return drafter.to(model.device, model.dtype).eval()


def plain_files(kind: type[TrainedDrafter]) -> Files:
    """The directories of a kind that is written in full width only."""
    return Files(lambda folder, model: load_drafter(folder, model, kind))


def load_weights(
    drafter: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, *, exact: bool = False
) -> None:
    """Give a drafter the weights that were read from `folder`, once names and shapes were checked."""
    wanted, path = drafter.state_dict(), folder / WEIGHTS_FILE
    check_tensors(tensors, wanted, path, exact=exact, error=DrafterError)
    drafter.load_state_dict(tensors, assign=True)


@contextlib.contextmanager
def named(folder: Path) -> Iterator[None]:
    """Inside, whatever is wrong with the weights is wrong with this drafter."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointError) as error:
        raise DrafterError(
            f"{folder / WEIGHTS_FILE} is missing or damaged: {error}; train the drafter again: "
            "linspec train-drafter"
        ) from error


def check_size_of_weights(folder: Path) -> None:
    """Raise DrafterError where there are no weights, or more than fit into the memory."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise DrafterError(f"{path} is missing or damaged; copy the drafter again")
    check_memory(path.stat().st_size, folder)


def read_drafter(folder: Path, kind: str) -> dict[str, Any]:
    """What drafter.json says; raises DrafterError when there is none or it is of another kind."""
    check_files(folder, DrafterError)
    path, data = folder / CONFIG_FILE, _read(folder)
    if data.get("kind") != kind:
        raise DrafterError(
            f"{path} describes a drafter of kind {shown(repr(data.get('kind')))}, expected {kind!r}"
        )
    return data


def kind_of(folder: Path) -> Any:
    """The kind that drafter.json says; raises DrafterError when there is none."""
    return _read(folder).get("kind")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise DrafterError(
            f"no drafter in {folder}: {CONFIG_FILE} is missing; train one: linspec train-drafter"
        )
    data = read_json(path, DrafterError)
    check_format(data, path, DrafterError)
    return data


def check_target(data: Mapping[str, Any], model: Decoder, folder: Path) -> None:
    """Raise DrafterError unless drafter.json names `model` as a target."""
    ours = fingerprint(model)
    if ours not in targets_of(data):
        raise DrafterError(
            f"the drafter in {folder} was trained for another model: fingerprint "
            f"{shown(data.get('target'))}, this model has {ours}; train its own: linspec train-drafter"
        )


def targets_of(data: Mapping[str, Any]) -> list[Any]:
    """The fingerprints of the models that drafter.json says it drafts for: one, or a list."""
    target = data.get("target")
    return target if isinstance(target, list) else [target]
