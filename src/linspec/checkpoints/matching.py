"""The tensors of a checkpoint against those of a model: each has its place, or the loading fails."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from linspec.checkpoints.families.base import Family, Tensors
from linspec.errors import CheckpointError
from linspec.models.model_types import Model


def own_tensors(model: Model) -> Tensors:
    """The state dict; what several modules share is stored once, under its first name."""
    tensors = dict(model.state_dict())
    for alias in _aliases(model):
        del tensors[alias]
    return tensors


def _aliases(model: Model) -> dict[str, str]:
    """Further names of shared parameters, and the first name of each."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in first:
            found[name] = first[id(weight)]
        else:
            first[id(weight)] = name
    return found


def match(
    expected: Tensors, found: Mapping[str, tuple[int, ...]], family: Family | None, folder: Path
) -> dict[str, str]:
    """Names on disk to expected names; raises CheckpointError unless each has its tensor."""
    names: dict[str, str] = {}
    strange: list[str] = []
    for name, shape in found.items():
        target = _target(name, expected, family)
        if target is None:
            strange += [] if _ignored(name, family) else [name]
        elif shape != tuple(expected[target].shape):
            raise CheckpointError(
                f"{name} in {folder} has shape {list(shape)}, config.json asks for "
                f"{list(expected[target].shape)}; config.json and weights are of different models"
            )
        else:
            names[name] = target
    missing = sorted(set(expected) - set(names.values()))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(expected)} tensors: {_some(missing)}; "
            "the checkpoint is incomplete or config.json is of another model"
        )
    if strange:
        raise CheckpointError(
            f"{folder} has {len(strange)} tensors that the model of config.json does not have: "
            f"{_some(strange)}; leaving them out would change the model"
        )
    return names


def _target(name: str, expected: Tensors, family: Family | None) -> str | None:
    if family is not None:
        name = family.current(name)
    if name in expected:
        return name
    full = f"{family.prefix}{name}" if family else name
    return full if full in expected else None


def _ignored(name: str, family: Family | None) -> bool:
    """Constants that old checkpoints carry, and the copy of a tied embedding."""
    return family is not None and name.endswith(family.ignored)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def fill(model: Model, tensors: Tensors, later: Collection[str] = ()) -> None:
    """Give the skeleton its tensors; afterwards nothing in it is without memory, but what comes `later`."""
    aliases = {alias: first for alias, first in _aliases(model).items() if first not in later}
    shared = {alias: tensors[first] for alias, first in aliases.items()}
    missing = model.load_state_dict(tensors | shared, assign=True, strict=not later).missing_keys
    left = set(missing) - set(later) - set(_aliases(model))
    if left:
        raise CheckpointError(f"nothing was read for {_some(sorted(left))}, which the model has")
    model.tie()
    bare = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not bare, f"buffers must be persistent to be loaded: {bare}"
