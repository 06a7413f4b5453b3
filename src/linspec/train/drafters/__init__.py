"""Drafters in training: one file for each kind, registered by name; `train_drafter` reads the names."""

from __future__ import annotations

from linspec.train.drafters import (
    block,
    chimera,
    eagle,
    first,
    hidden_transfer,
    lud,
    medusa,
    medusa2,
    ppd,
    specdec_head,
    specdiff,
)
from linspec.train.drafters.base import TRAININGS, DrafterConfig, DrafterTraining
from linspec.train.drafters.run import predicted, train_drafter

__all__ = [
    "TRAININGS",
    "DrafterConfig",
    "DrafterTraining",
    "block",
    "chimera",
    "eagle",
    "first",
    "hidden_transfer",
    "lud",
    "medusa",
    "medusa2",
    "ppd",
    "predicted",
    "specdec_head",
    "specdiff",
    "train_drafter",
]
