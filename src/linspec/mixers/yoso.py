"""YOSO-E (Zeng et al. 2021): weights that are the expected collisions of locality-sensitive hashes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.linear import LinearMixer
from linspec.mixers.ops.blocks import shifted
from linspec.mixers.ops.exact import Exact, plain_weights
from linspec.mixers.ops.features import unit
from linspec.mixers.ops.summed import Summed, to_blocks

HASH_BITS = 8
# the slope of acos is infinite at 1
LARGEST_COSINE = 0.999


@MIXERS.register(
    "yoso",
    summary="(1 - acos(q̂·k̂)/π)⁸ weights, exact within the span, to second order before it, L2-normalized",
    paper="Zeng et al. 2021, arXiv 2111.09714",
    state="(d²/2 + 2·d + 1)·d + 2·n·G·d per KV head",
    cost="(2·n·G + d²)·d per token",
)
class Yoso(LinearMixer):
    """o_t = Σ f(q̂_t·k̂_s) v_s / ‖…‖ with f(x) = (1 - acos(x)/π)^τ, the chance that τ bits agree.

    f is no finite product of features, so exact weights need all keys. They are exact within the span;
    over closed groups f is its Taylor polynomial a + b x + c x², which is positive, deterministic and
    has 1 + 2 d + d²/2 features. A span over the whole text gives exact YOSO-E.
    """

    keeps_features = False

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not Yoso:
            return None
        return self.summed_plan("series", "collisions", end="unit")

    def sum_width(self) -> int:
        return 1 + self.head_width * (2 + self.head_width // 2)

    def own_exact(self) -> Exact | None:
        return Exact(partial(plain_weights, of=collisions), unit, unit)

    def make_summed(self) -> Summed:
        maps = self.summed_queries, self.summed_keys
        return Series(self.groups, *maps, self.sum_width(), causal=self.config.causal)

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        return series_features(x)

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return unit(o)


def collisions(products: torch.Tensor) -> torch.Tensor:
    """f of cosines."""
    cosines = products.clamp(-LARGEST_COSINE, LARGEST_COSINE)
    return (1 - cosines.acos() / math.pi) ** HASH_BITS


def series_features(x: torch.Tensor) -> torch.Tensor:
    """Features whose products are a + b x + c x² of the cosine x."""
    x = unit(x)
    width, half = x.shape[-1], x.shape[-1] // 2
    # channel i times channel i + j for all i, around the end: each pair once up to j = half - 1
    turned = shifted(torch.cat((x, x[..., :half]), dim=-1), -1, width, half + 1, at=-2)
    share = x.new_full((half + 1, 1), math.sqrt(2))
    share[0] = 1
    if width % 2 == 0:
        # ... and twice at half the width
        share[half] = 1
    a, b, c = (math.sqrt(factor) for factor in taylor_factors(HASH_BITS))
    pairs = (turned * x.unsqueeze(-2) * (c * share)).flatten(-2)
    return torch.cat((torch.full_like(x[..., :1], a), b * x, pairs), dim=-1)


@dataclass(frozen=True)
class Series(Summed):
    """The summed part; of fewer keys than features it reads the cosines themselves, which is less work."""

    width: int = 0
    causal: bool = True

    def blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        if start is not None or k.shape[2] > self.width:
            return super().blocks(q, k, v, start)
        return self.from_cosines(q, k, v)

    def blocks_both(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, alone: bool
    ) -> torch.Tensor:
        if k.shape[2] > self.width:
            return super().blocks_both(q, k, v, alone=alone)
        return self.from_cosines(q, k, v)

    def from_cosines(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `blocks` and `blocks_both`, without features."""
        blocks = to_blocks(unit(q), self.groups.size)
        cosines = blocks @ unit(k).mT[:, :, None]
        a, b, c = taylor_factors(HASH_BITS)
        far = self.beyond_span(blocks.shape[2], k.shape[2], k.device)
        return ((a + b * cosines + c * cosines.square()) * far) @ v[:, :, None]

    def beyond_span(self, blocks: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Where the groups within a block's span do not reach, behind it or to both sides: [n, 1, T]."""
        # no key // group: torch.compile splits the loop over keys by that divisor and drops what is left
        # when it does not divide them (torch 2.13)
        size, span = self.groups.size, self.groups.span
        keys = torch.arange(tokens, device=device)
        first = torch.arange(blocks, device=device)[:, None, None] * size
        behind = keys < first - (span - 1) * size
        return behind if self.causal else behind | (keys >= first + span * size)


def taylor_factors(bits: int) -> tuple[float, float, float]:
    """The factors a, b, c of (1/2 + asin(x)/π)^bits = a + b x + c x² + ..."""
    a = 0.5**bits
    b = bits * 0.5 ** (bits - 1) / math.pi
    c = math.comb(bits, 2) * 0.5 ** (bits - 2) / math.pi**2
    return a, b, c
