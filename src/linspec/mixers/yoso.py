"""YOSO-E (Zeng et al. 2021): weights that are the expected collisions of locality-sensitive hashes."""

from __future__ import annotations

import math

import torch

from linspec.mixers.base import MIXERS
from linspec.mixers.linear import GroupedLinear, unit

HASH_BITS = 8
# the slope of acos is infinite at 1
LARGEST_COSINE = 0.999


@MIXERS.register(
    "yoso",
    summary="(1 - acos(q̂·k̂)/π)⁸ weights, exact within reach, to second order beyond, L2-normalised",
    paper="Zeng et al. 2021, arXiv 2111.09714",
    state="(d² + 3·d + 2)/2·d + 2·n·G·d per KV head",
    direction="causal",
    cost="(2·n·G + d²)·d per token",
)
class Yoso(GroupedLinear):
    """o_t = Σ f(q̂_t·k̂_s) v_s / ‖…‖ with f(x) = (1 - acos(x)/π)^τ, the chance that τ bits agree.

    f is no finite product of features, so exact weights need all keys. They are exact within reach;
    over closed groups f is its Taylor polynomial a + b x + c x², which is positive, deterministic and
    has 1 + d + d(d+1)/2 features. A span over the whole text gives exact YOSO-E.
    """

    wide = True
    apart = True

    def sum_width(self) -> int:
        return 1 + self.head_width + self.head_width * (self.head_width + 1) // 2

    def near_features(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.mixer.kernel == "softmax" else unit(x)

    def in_group(self, products: torch.Tensor) -> torch.Tensor | None:
        cosines = products.clamp(-LARGEST_COSINE, LARGEST_COSINE)
        return (1 - cosines.acos() / math.pi) ** HASH_BITS

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """Features whose products are a + b x + c x² of the cosine x."""
        first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        # a pair of different channels stands for itself and its mirror image
        share = x.new_tensor((math.sqrt(2), 1.0))[(first == second).long()]
        x = unit(x)
        a, b, c = (math.sqrt(factor) for factor in taylor_factors(HASH_BITS))
        pairs = x[..., first] * x[..., second] * share
        return torch.cat((torch.full_like(x[..., :1], a), b * x, c * pairs), dim=-1)

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return unit(o)


def taylor_factors(bits: int) -> tuple[float, float, float]:
    """The factors a, b, c of (1/2 + asin(x)/π)^bits = a + b x + c x² + ..."""
    a = 0.5**bits
    b = bits * 0.5 ** (bits - 1) / math.pi
    c = math.comb(bits, 2) * 0.5 ** (bits - 2) / math.pi**2
    return a, b, c
