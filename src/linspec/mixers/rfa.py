"""Random feature attention (Peng et al. 2021): sines and cosines of a Gaussian kernel's phases."""

from __future__ import annotations

import torch

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.ops.features import unit
from linspec.mixers.options import RandomFeatureOptions
from linspec.mixers.random_features import RandomFeatures

# the estimate of a sum of positive weights can come out near zero, or negative
SMALLEST_TOTAL = 0.1


@MIXERS.register(
    "rfa",
    summary="random sines and cosines of exp(-‖q̂ - k̂‖² / 2) over all tokens, normalized",
    paper="Peng et al. 2021, arXiv 2103.02143",
    state="2·m·(d + 1) + n·G·(2·d + 1) per KV head, m = d·ln d",
    cost="(2·n·G + 4·m)·d per token",
    options=RandomFeatureOptions,
)
class Rfa(RandomFeatures):
    """Relu's formula with φ(x) = m^(-1/2) [sin(w_i·x̂), cos(w_i·x̂)], x̂ = x / ‖x‖.

    The denominator is at least 0.1: the true sum never falls below exp(-2), its estimate may.
    """

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not Rfa:
            return None
        rows, end = self.projection[None], {"end": "bounded", "floor": SMALLEST_TOTAL, "ones": True}
        return self.summed_plan("phases", "products", query_map=rows, key_map=rows, **end)

    def sum_width(self) -> int:
        return 2 * self.count

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        phases = self.projected(unit(x))
        return (torch.cat((phases.sin(), phases.cos()), dim=-1) * self.count**-0.5).to(x.dtype)

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return o[..., :-1] / o[..., -1:].clamp_min(SMALLEST_TOTAL)
