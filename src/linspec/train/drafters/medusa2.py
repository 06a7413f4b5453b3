"""Medusa-2 (Cai et al. 2024, arXiv 2401.10774): heads and model learn together.

The heads come first, on the model as it is. Then both learn: the model by low-rank adapters, held to its own
distributions before, so that it changes no more than the heads gain by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch

from linspec.decoding.step import FINAL
from linspec.drafters.heads import MedusaHeads
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS
from linspec.train.drafters.joint import JointTraining
from linspec.train.drafters.medusa import MedusaTraining, MedusaTrainingOptions, heads_loss
from linspec.train.drafters.states import TargetStates
from linspec.train.drafters.walk import Prediction
from linspec.train.pieces import Output, Teacher, likeliest, loss_in_pieces
from linspec.utils.options import option
from linspec.utils.sizes import check_positive, check_sizes

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class Medusa2TrainingOptions(MedusaTrainingOptions):
    """Those of Medusa, and how the model learns with the heads."""

    heads_weight: float = option(
        "weight of the loss of the heads beside the model's own", default=0.2
    )
    warmup: float = option(
        "share of the steps in which the heads learn alone, below 1", default=0.5
    )
    rank: int = option("rank of the adapters by which the model learns", default=32)

    def __post_init__(self) -> None:
        MedusaTrainingOptions.__post_init__(self)
        check_sizes(self, "rank")
        check_positive("heads_weight", self.heads_weight)
        check_positive("warmup", self.warmup, zero=True)
        if self.warmup >= 1:
            raise ValueError(f"warmup must be below 1, got {self.warmup}; 0.5 is usual")


@TRAININGS.register(
    "medusa2",
    summary="a new model with Medusa heads inside, trained together; the model changes",
    paper="Cai et al. 2024, arXiv 2401.10774",
    options=Medusa2TrainingOptions,
)
class Medusa2Training(JointTraining[MedusaHeads]):
    """KL(model before ‖ model) + heads_weight · the loss of the heads, which learn alone at first."""

    options: Medusa2TrainingOptions
    drafter: ClassVar[str] = "medusa"
    # of heads; that of the adapters is a quarter of it
    lr = 2e-3

    def __init__(self, options: Medusa2TrainingOptions) -> None:
        super().__init__(options)
        self._heads = MedusaTraining(options)

    @property
    def ahead(self) -> int:
        return self._heads.ahead

    @property
    def warmup(self) -> float:
        return self.options.warmup

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> MedusaHeads:
        return self._heads.make(target, stream, seed)

    def loss(self, drafter: MedusaHeads, states: TargetStates) -> torch.Tensor:
        return self._heads.loss(drafter, states)

    def joint_loss(
        self, drafter: MedusaHeads, target: PeftModel, batch: torch.Tensor
    ) -> torch.Tensor:
        decoder = cast(Decoder, target.get_base_model())
        with torch.no_grad(), target.disable_adapter():
            wanted = decoder.hidden(batch[:, :-1])
        hidden, output = decoder.hidden(batch[:, :-1]), Output.of(decoder.head)
        change = loss_in_pieces(hidden, output, teacher=Teacher(wanted, output))
        chosen = likeliest(hidden, decoder.head, decoder.config.vocab_size)
        states = TargetStates(decoder, batch, chosen, {FINAL: hidden})
        heads = heads_loss(drafter, states, self.options.decay)
        return change + self.options.heads_weight * heads

    def measure(
        self, drafter: MedusaHeads, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        return self._heads.measure(drafter, stream, context=context, tokens=tokens)
