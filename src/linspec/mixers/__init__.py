"""Mixers: one file each, registered by name."""

from linspec.mixers import (
    aug,
    by_head,
    gdn,
    gla,
    global_,
    grouped,
    hedgehog,
    linformer,
    local,
    performer,
    relu,
    rfa,
    softmax,
    streaming,
    transnormer,
    window,
    yoso,
)
from linspec.mixers.base import MIXERS, Mixer

__all__ = [
    "MIXERS",
    "Mixer",
    "aug",
    "by_head",
    "gdn",
    "gla",
    "global_",
    "grouped",
    "hedgehog",
    "linformer",
    "local",
    "performer",
    "relu",
    "rfa",
    "softmax",
    "streaming",
    "transnormer",
    "window",
    "yoso",
]
