"""What every kind of drafter that is trained says: its shape, its loss, and what is measured at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

from linspec.drafters.trained import TrainedDrafter
from linspec.errors import InputError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.compiled import check_choice
from linspec.train.drafters.states import TargetStates
from linspec.train.drafters.walk import Prediction
from linspec.train.loop import TrainConfig
from linspec.train.precision import check_precision
from linspec.utils.registry import Registry
from linspec.utils.sizes import check_positive, check_sizes

D = TypeVar("D", bound=TrainedDrafter)
# guesses of each depth whose accuracy is measured: no published tree uses more
RANKS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """How to train a drafter of any kind; its shape is an option of the kind.

    tokens: of text to train on; context: tokens of a window; batch_tokens: tokens of a step. lr: None for the
    rate of the kind. calibration_tokens: held-out tokens on which the drafter is measured. cache_gb: the
    target's states are kept on disk up to so much where the text is read more than once; 0 keeps none.
    """

    tokens: int = 3_000_000
    context: int = 512
    batch_tokens: int = 4096
    lr: float | None = None
    calibration_tokens: int = 65_536
    cache_gb: float = 4.0
    precision: str = "auto"
    compile: str = "auto"
    save_every: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.compile)
        check_precision(self.precision)
        check_positive("save_every", self.save_every, zero=True)
        check_positive("cache_gb", self.cache_gb, zero=True)
        check_sizes(self, "tokens context batch_tokens calibration_tokens")
        check_sizes(self, "seed", least=0)
        if self.lr is not None:
            check_positive("lr", self.lr)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: what decides the result; a compiled run is the same run."""
        return {name: value for name, value in asdict(self).items() if name != "compile"}

    @property
    def rows(self) -> int:
        """Windows of a step."""
        return max(1, self.batch_tokens // self.context)

    def training(self, lr: float) -> TrainConfig:
        """Settings of the training loop; `lr` is the rate of the kind."""
        return TrainConfig(
            steps=max(1, round(self.tokens / (self.rows * self.context))),
            lr=self.lr or lr,
            precision=self.precision,
            compile=self.compile,
            save_every=self.save_every,
            seed=self.seed,
        )


class DrafterTraining(ABC, Generic[D]):
    """One kind of drafter in training. The target stays as it is; only the drafter learns.

    Attributes:
        name: under which it is registered, and that of the drafter which it trains.
        lr: its learning rate, where the user gives none.
    """

    name: ClassVar[str]
    lr: ClassVar[float] = 5e-3

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @property
    def ahead(self) -> int:
        """How many tokens behind a place its loss looks at; windows are longer than that."""
        return 1

    def reads(self, target: DecoderConfig) -> tuple[int, ...]:
        """The layers of the target whose states it reads, beside those that the output layer reads."""
        return ()

    @abstractmethod
    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> D:
        """A drafter that knows nothing yet; `stream` are the tokens that it will learn from."""

    @abstractmethod
    def loss(self, drafter: D, states: TargetStates) -> torch.Tensor:
        """What is made small: a number, with gradients for the drafter alone."""

    @abstractmethod
    def measure(
        self, drafter: D, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction | None:
        """Measure the trained drafter on held-out text, and keep in it what it needs to draft.

        Returns what it brings when it is served; None where its drafts are not counted in rounds.
        """


def check_length(context: int, ahead: int, kind: str) -> None:
    """Raise InputError where windows of `context` tokens hold nothing to learn from."""
    if context <= ahead:
        raise InputError(
            f"windows of {context} tokens are too few for a drafter of kind {kind!r}, which looks {ahead} "
            "tokens ahead; give more text, or a larger context"
        )


TRAININGS: Registry[DrafterTraining[Any]] = Registry(
    "kind of drafter", "linspec.drafter_trainings", base=DrafterTraining
)
"""The registry of drafters that can be trained. Packages add to it by entry points of that group."""
