"""Mixers: one file each, registered by name."""

from linspec.mixers import aug, global_, grouped, hedgehog, local, relu, softmax, window
from linspec.mixers.base import MIXERS, Mixer

__all__ = [
    "MIXERS",
    "Mixer",
    "aug",
    "global_",
    "grouped",
    "hedgehog",
    "local",
    "relu",
    "softmax",
    "window",
]
