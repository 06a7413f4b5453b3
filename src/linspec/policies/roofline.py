"""A whole curve of step times from a few of them: what curves of made-up machines have in common.

HELP (Lee et al. 2021, arXiv 2106.08630) learns from many devices how to predict a new one from ten
measurements. A curve over 1…64 nodes is a simpler thing: here the devices are rooflines (a step reads its
weights, or computes, whichever takes longer; and has a fixed cost, and tiles), the logarithms of their times
are taken for Gaussian, and a new device is the Gaussian given what was measured of it: closed, no training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil, exp, log

import torch
from torch import Tensor

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_DEVICES = 400
# standard deviations: of a device's speed, and of what is measured, as logarithms
_LEVEL, _NOISE = 3.0, 0.04


def device(rng: random.Random) -> list[float]:
    """Seconds of steps of `SIZES` on a machine that does not exist."""

    def between(low: float, high: float) -> float:
        return exp(rng.uniform(log(low), log(high)))

    # parts of a model, such as layers and head, become bound by arithmetic at different numbers of nodes
    parts = [(between(0.1, 1.0), between(1.0, 64.0)) for _ in range(3)]
    fixed, each = between(0.01, 1.0), between(0.001, 0.05)
    tile = rng.choice((1, 1, 2, 4, 8, 16))
    smooth = between(2.0, 8.0)
    found = []
    for nodes in SIZES:
        rows = tile * ceil(nodes / tile) * rng.uniform(0.95, 1.05)
        steps = (read * (1 + (rows / knee) ** smooth) ** (1 / smooth) for read, knee in parts)
        found.append(fixed + each * nodes + sum(steps))
    return found


@cache
def _prior() -> tuple[Tensor, Tensor]:
    """Mean [sizes] and covariance [sizes, sizes] of the logarithms of made-up curves, at any speed."""
    rng = random.Random(0)
    curves = torch.tensor([device(rng) for _ in range(_DEVICES)], dtype=torch.float64).log()
    shapes = curves - curves[:, :1]
    return shapes.mean(0), shapes.T.cov() + _LEVEL**2


def completed(measured: Mapping[int, float], noise: float = _NOISE) -> dict[int, float]:
    """Seconds of steps of all `SIZES`, given those of some.

    What was measured is followed as far as it is believed: `noise` is its standard deviation, relative.
    """
    mean, covariance = _prior()
    places = [SIZES.index(nodes) for nodes in measured]
    seen = torch.tensor([log(seconds) for seconds in measured.values()], dtype=torch.float64)
    known = covariance[places][:, places] + noise**2 * torch.eye(len(places), dtype=torch.float64)
    curve = mean + covariance[:, places] @ torch.linalg.solve(known, seen - mean[places])
    return dict(zip(SIZES, _rising(curve.exp().tolist()), strict=True))


def _rising(seconds: Sequence[float]) -> list[float]:
    """More nodes never cost less, and noise only adds time: what fewer nodes took longer was noise."""
    found = list(seconds)
    for place in range(len(found) - 2, -1, -1):
        found[place] = min(found[place], found[place + 1])
    return found
