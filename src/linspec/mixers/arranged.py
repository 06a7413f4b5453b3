"""The grouped arrangement: weights of another kernel within the span, on the pretrained model's keys."""

from __future__ import annotations

from functools import partial

import torch

from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.exact import Exact, plain_weights, relu_squared, softmax_weights
from linspec.mixers.ops.features import unit


def arranged_exact(config: StackConfig, mixer: MixerConfig) -> Exact:
    """The exact part of a mixer whose kernel is not its own."""
    width = partial(_first, width=config.head_width)
    if mixer.kernel == "softmax":
        weights = partial(softmax_weights, scale=config.score_scale, cap=config.score_cap)
        return Exact(weights, width, width)
    unit_width = partial(_first_unit, width=config.head_width)
    return Exact(partial(plain_weights, of=relu_squared), unit_width, unit_width)


def _first(x: torch.Tensor, *, width: int) -> torch.Tensor:
    """The key of an entry, without gates that stand behind it."""
    return x[..., :width]


def _first_unit(x: torch.Tensor, *, width: int) -> torch.Tensor:
    return unit(x[..., :width])
