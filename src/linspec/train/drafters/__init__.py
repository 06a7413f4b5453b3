"""Drafters in training: one file for each kind, registered by name; `train_drafter` reads the names."""

from __future__ import annotations

from linspec.train.drafters import eagle, first, medusa
from linspec.train.drafters.base import TRAININGS, DrafterConfig, DrafterTraining
from linspec.train.drafters.run import train_drafter

__all__ = [
    "TRAININGS",
    "DrafterConfig",
    "DrafterTraining",
    "eagle",
    "first",
    "medusa",
    "train_drafter",
]
