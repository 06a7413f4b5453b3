"""Mixers that exist only inside the study: α fixed or started at one, and the convolution that leaks.

They are registered while a cell runs and forgotten afterwards: no checkpoint outside a study can
name them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from linspec.errors import ConfigError
from linspec.mixers import MIXERS, Mixer
from linspec.mixers.aug import Aug
from linspec.mixers.config import MixerConfig
from linspec.mixers.ops.convolution import convolve
from linspec.models.config import DecoderConfig

# "" is the mixer as it is; "both" is the paper's Local + Grouped without α
VARIANTS = ("", "both", "alpha=1", "unmasked")


class Unmasked(Aug):
    """`aug` with a centred convolution: o_t also reads v_{t+1}, which holds the label.

    The usual convolution of encoders (Nyströmformer, Castling-ViT; You et al. 2024, section 4.1).
    `leaking` False leaves its future taps out, as they are when the future does not exist yet.
    """

    leaking = True

    def __init__(self, config: DecoderConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.future_taps = nn.Parameter(torch.zeros(self.heads, mixer.taps - 1))

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        o = super().mix(q, k, v, sums)
        if not self.leaking:
            return o
        # the past of the reversed values is the future; its tap on the token itself is there already
        taps = F.pad(self.future_taps, (1, 0))
        ahead = convolve(v.flip(2), taps, self.repeats, None).flip(2)
        return o + ahead[..., : self.head_width]


def _with_alpha(base: str, learned: bool) -> type[Mixer]:
    """A factory of `base` whose share of the sum starts at one."""

    def build(config: DecoderConfig, mixer: MixerConfig) -> Mixer:
        made = MIXERS[base](config, replace(mixer, name=base))
        if not isinstance(getattr(made, "alpha", None), nn.Parameter):
            raise ConfigError(f"mixer {base!r} has no share α of a sum")
        if learned:
            made.alpha = nn.Parameter(torch.ones(()))
        else:
            del made.alpha
            made.register_buffer("alpha", torch.ones(()))
        return made

    return cast("type[Mixer]", build)


@contextlib.contextmanager
def variant(mixer: MixerConfig, kind: str) -> Iterator[MixerConfig]:
    """Yield the configuration of a variant of `mixer`, known to the registry while it lasts."""
    if not kind:
        yield mixer
        return
    if kind not in VARIANTS:
        raise ConfigError(f"unknown variant {kind!r}; known: {', '.join(VARIANTS)}")
    name = f"study-{mixer.name}-{kind}"
    made = Unmasked if kind == "unmasked" else _with_alpha(mixer.name, kind == "alpha=1")
    paper = "You et al. 2024, arXiv 2406.07368"
    MIXERS.register(name, summary="inside a study only", paper=paper)(made)
    try:
        yield replace(mixer, name=name)
    finally:
        MIXERS.forget(name)
