"""Performer (Choromanski et al. 2021): positive random features of the softmax kernel, FAVOR+."""

from __future__ import annotations

import torch

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.options import RandomFeatureOptions
from linspec.mixers.random_features import RandomFeatures

# no feature is 0, so that no denominator is
FEATURE_FLOOR = 1e-4


@MIXERS.register(
    "performer",
    summary="positive random features of exp(q·k / sqrt(d)) over all tokens, normalized",
    paper="Choromanski et al. 2021, arXiv 2009.14794",
    state="m·(d + 1) + n·G·(2·d + 1) per KV head, m = d·ln d",
    cost="(2·n·G + 2·m)·d per token",
    options=RandomFeatureOptions,
)
class Performer(RandomFeatures):
    """Relu's formula with φ(x) = m^(-1/2) (exp(w_i·y - ‖y‖²/2) + ε), y = x / K^(1/4).

    A query's largest exponent is subtracted first, which its denominator cancels. A causal sum cannot
    do so for keys, as the largest is not known yet; their exponents are at most ‖w_i‖²/2.
    """

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not Performer:
            return None
        rows = self.projection[None]
        return self.quotient_plan("positive", query_map=rows, key_map=rows)

    def sum_width(self) -> int:
        return self.count

    def summed_queries(self, q: torch.Tensor) -> torch.Tensor:
        exponents = self._exponents(q)
        return self._positive(exponents - exponents.amax(-1, keepdim=True)).to(q.dtype)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        return self._positive(self._exponents(k)).to(k.dtype)

    def _exponents(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.head_width**-0.25
        return self.projected(y) - y.square().sum(-1, keepdim=True) / 2

    def _positive(self, exponents: torch.Tensor) -> torch.Tensor:
        return (exponents.exp() + FEATURE_FLOOR) * self.count**-0.5
