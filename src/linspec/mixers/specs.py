"""Mixers by their specs, NAME, NAME:KERNEL or NAME:key=value,…, and what is taken where they say nothing."""

from __future__ import annotations

from typing import Any

from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.options import given

DEFAULT_GROUP = 64
DEFAULT_EXACT_TOKENS = 384
DEFAULT_TAPS = 32
DEFAULT_WINDOW = 64
DEFAULT_SINKS = 4
# mixers that by default keep the teacher's softmax weights of exact positions ...
SOFTMAX_WITHIN = ("local", "grouped", "aug", "gla", "gdn")
# ... and all that have exact weights there
_KEPT = ("streaming", "by-head", "h2o", "snapkv", "pages", "delta", "tidal", "shadow")
SEE_EXACTLY = (*SOFTMAX_WITHIN, *_KEPT, "hedgehog", "linformer", "yoso")


def make_mixer(
    mixer: str | MixerConfig,
    *,
    group: int = DEFAULT_GROUP,
    span: int | None = None,
    kernel: str | None = None,
    taps: int | None = None,
    window: int | None = None,
    features: int = 0,
    keep: int = 0,
    seed: int = 0,
    sinks: int | None = None,
) -> MixerConfig:
    """The configuration of NAME, NAME:KERNEL or NAME:key=value,…; raises ConfigError for an unknown one.

    What the name gives goes before the arguments.
    Mixers that see a few groups exactly keep the teacher's softmax weights there, over two groups:
    with one, a token at the start of a group would see nothing of its past exactly. features, keep,
    seed: see MixerConfig; 0 for the mixer's default.
    """
    if isinstance(mixer, MixerConfig):
        MIXERS.entry(mixer.name)
        return mixer
    entry, options = MIXERS.read(mixer)
    sizes: dict[str, Any] = {"group": group, "span": span, "kernel": kernel, "taps": taps}
    sizes |= {"window": window, "features": features, "keep": keep, "seed": seed, "sinks": sinks}
    own = given(options)
    sizes |= {name: own.pop(name) for name in sizes if name in own}
    usual = _usual(entry.name)
    chosen = {name: value if value is not None else usual[name] for name, value in sizes.items()}
    return MixerConfig(name=entry.name, options=own, **chosen)


def _usual(mixer: str) -> dict[str, Any]:
    """What is taken for settings of this mixer that nobody gives."""
    return {
        "span": 2 if mixer in SEE_EXACTLY else 1,
        "kernel": "softmax" if mixer in SOFTMAX_WITHIN else "own",
        "taps": DEFAULT_TAPS if mixer == "aug" else 0,
        "window": DEFAULT_WINDOW if mixer == "window" else 0,
        "sinks": DEFAULT_SINKS if mixer in ("streaming", "by-head") else 0,
    }


def leaves_span(mixer: str | MixerConfig) -> bool:
    """Whether this mixer says nothing about its span."""
    return not isinstance(mixer, MixerConfig) and "span" not in given(MIXERS.read(mixer)[1])
