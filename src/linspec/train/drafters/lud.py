"""A model and its slot in training for lexical unit decoding (Sun et al. 2024, arXiv 2405.15208)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch

from linspec.drafters.lud import Slot, SlotConfig
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS
from linspec.train.drafters.chains import cut_of, hidden_behind
from linspec.train.drafters.joint import JointTraining
from linspec.train.pieces import Labels, Output, loss_in_pieces
from linspec.utils.options import option
from linspec.utils.sizes import check_positive, check_sizes

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class LUDTrainingOptions:
    """What a unit is, and how much the slots weigh."""

    slots: int = option("slots: tokens of a unit behind its first", default=4)
    alpha: float = option(
        "a token is of the unit before it if the model is so sure of it", default=0.9
    )
    slot_weight: float = option("weight of the loss of slots beside that of the text", default=1.0)
    rank: int = option("rank of the adapters by which the model learns", default=32)

    def __post_init__(self) -> None:
        check_sizes(self, "slots rank")
        check_positive("alpha", self.alpha)
        check_positive("slot_weight", self.slot_weight)


@TRAININGS.register(
    "lud",
    summary="a new model, which says the rest of a unit in slots; the model changes",
    paper="Sun et al. 2024 (LUD), arXiv 2405.15208",
    options=LUDTrainingOptions,
)
class LUDTraining(JointTraining[Slot]):
    """The text as ever, and behind a cut in each window the rest of the unit that begins there."""

    options: LUDTrainingOptions
    drafter: ClassVar[str] = "lud"
    lr = 1e-3

    @property
    def ahead(self) -> int:
        return self.options.slots

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> Slot:
        config = target.config
        shape = SlotConfig(
            width=config.width, vocab_size=config.vocab_size, slots=self.options.slots
        )
        slot, table = Slot(shape), target.embed.weight.detach().float().cpu()
        noise = torch.randn(1, config.width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            slot.embedding.copy_(table.mean(0) + 0.1 * table.std(0) * noise)
        return slot

    def joint_loss(self, drafter: Slot, target: PeftModel, batch: torch.Tensor) -> torch.Tensor:
        decoder = cast(Decoder, target.get_base_model())
        return lud_loss(decoder, drafter, batch, self.options.alpha, self.options.slot_weight)

    def measure(self, drafter: Slot, stream: np.ndarray, *, context: int, tokens: int) -> None:
        """Nothing: each of its drafts says how sure it is."""


def lud_loss(
    target: Decoder, slot: Slot, batch: torch.Tensor, alpha: float, slot_weight: float
) -> torch.Tensor:
    """CE of the text, and of the slots that belong to the unit behind the cut."""
    ids, labels, count = batch[:, :-1], batch[:, 1:], slot.config.slots
    states, output = target.hidden(ids), Output.of(target.head)
    cut = cut_of(ids, ids.shape[1] - count)
    # slot k stands k places behind the last token, and says the token behind its own place
    places = slice(cut, cut + count)
    unit = in_unit(_sureness(target, states[:, places], labels[:, places]), alpha)
    hidden = hidden_behind(target, ids[:, :cut], slot.embedding.expand(count, -1))
    slots = Labels(labels[:, places], slot_weight * unit / unit.sum().clamp(min=1.0))
    text = loss_in_pieces(states, output, Labels(labels))
    return text + loss_in_pieces(hidden, output, slots)


@torch.no_grad()
def _sureness(target: Decoder, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """How likely the target finds each of a few tokens, [B, K]."""
    shares = target.head(states).float().softmax(-1)
    return shares.gather(-1, ids[..., None])[..., 0]


def in_unit(sure: torch.Tensor, alpha: float) -> torch.Tensor:
    """Which of the tokens [B, K] behind the first of a unit are of it, as 0 and 1: until one below alpha."""
    return (sure >= alpha).float().cumprod(-1)
