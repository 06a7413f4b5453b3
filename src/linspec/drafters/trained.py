"""What every trained drafter is: a module made for one target, which can say what it is in JSON."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import nn

from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.border import parse

C = TypeVar("C")


class TrainedDrafter(nn.Module, ABC):
    """The weights of a drafter; see `linspec.drafters.saved` for the directory that holds them.

    Attributes:
        kind: its name in drafter.json, that of the drafter that uses it and of the training that makes it.
    """

    kind: ClassVar[str]

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Plain JSON types from which `from_description` makes it again, without its weights."""

    @classmethod
    @abstractmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        """A drafter for `target` whose weights will be read; `path` is the file that says `data`.

        Raises DrafterError where these are no description, or one of a drafter for another shape of model.
        """

    def bind(self, target: Decoder) -> None:
        """Draft for another form of the target, such as its quantized one."""

    def check_weights(self, path: Path) -> None:
        """Raise DrafterError where the weights read from `path` have impossible values."""


@dataclass(frozen=True, slots=True)
class Files:
    """What can be done with the directories of a kind of trained drafter.

    load: the drafter in a directory for a model, in the form in which it was written. pack: writes one that
    was loaded from plain weights, and whose model has been quantized since, to a new directory, with weights
    of so many bits and what its drafter.json said; returns what it wrote. None where there is no such form.
    """

    load: Callable[[Path, Decoder], nn.Module]
    pack: Callable[[Any, Decoder, Path, int, Mapping[str, Any]], nn.Module] | None = None


def read_shape(shape: type[C], data: Mapping[str, Any], model: Decoder, path: Path) -> C:
    """The dataclass `shape` from the entries of drafter.json that have its fields' names.

    Raises DrafterError unless they are sound, and of a drafter for a model of this width and vocabulary.
    """
    known = {field.name for field in fields(shape)}  # type: ignore[arg-type]  # a dataclass
    given = {key: value for key, value in data.items() if key in known}
    try:
        config = parse(shape, given, f"{path} is not a sound drafter")
    except ConfigError as error:
        raise DrafterError(str(error)) from error
    made, ours = (
        (given["width"], given["vocab_size"]),
        (model.config.width, model.config.vocab_size),
    )
    if made != ours:
        raise DrafterError(
            f"the drafter in {path.parent} was trained for another model: width {made[0]} and "
            f"vocabulary {made[1]}, this model has width {ours[0]} and vocabulary {ours[1]}"
        )
    return config


def read_accuracies(given: Any, depth: int, vocabulary: int, path: Path) -> list[list[float]]:
    """The accuracies of drafter.json: of each depth, how often its rank-i guess is right.

    Raises DrafterError unless each is a share, for a drafter of `depth` tokens of a vocabulary.
    """
    try:
        accuracies = parse(list[list[float]], given, f"{path}: accuracies")
    except ConfigError as error:
        raise DrafterError(f"{error}; {_AGAIN}") from error
    wrong = [share for share in itertools.chain(*accuracies) if not 0 <= share <= 1]
    if wrong:
        raise DrafterError(f"{path}: accuracies must be shares in 0..1, got {wrong[0]}; {_AGAIN}")
    if len(accuracies) > depth:
        raise DrafterError(
            f"{path.parent} is calibrated for drafts {len(accuracies)} tokens deep but has only "
            f"{depth} heads; {_AGAIN}"
        )
    ranks = max(map(len, accuracies), default=0)
    if ranks > vocabulary:
        raise DrafterError(
            f"{path.parent} is calibrated for {ranks} guesses but has only {vocabulary} tokens; {_AGAIN}"
        )
    return accuracies


def check_calibrated(accuracies: Sequence[Sequence[float]], kind: str) -> None:
    """Raise DrafterError for a drafter of this kind that was never measured."""
    if not any(map(len, accuracies)):
        raise DrafterError(
            f"this drafter was never calibrated, so no tree can be made of it; train it with "
            f"linspec train-drafter --kind {kind}"
        )


_AGAIN = "calibrate it again with linspec train-drafter"


def check_drafted(ids: torch.Tensor | None, vocabulary: int, path: Path) -> None:
    """Raise DrafterError where the ids of the tokens that are drafted are none of the target's."""
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise DrafterError(
            f"{path}: the drafted tokens are not all in 0..{vocabulary - 1}; copy the drafter again"
        )
