"""YOSO-E (Zeng et al. 2021): weights that are the expected collisions of locality-sensitive hashes."""

from __future__ import annotations

import math

import torch

from linspec.mixers.base import MIXERS
from linspec.mixers.blocks import shifted
from linspec.mixers.linear import GroupedLinear, unit

HASH_BITS = 8
# the slope of acos is infinite at 1
LARGEST_COSINE = 0.999


@MIXERS.register(
    "yoso",
    summary="(1 - acos(q̂·k̂)/π)⁸ weights, exact within reach, to second order beyond, L2-normalised",
    paper="Zeng et al. 2021, arXiv 2111.09714",
    state="(d²/2 + 2·d + 1)·d + 2·n·G·d per KV head",
    cost="(2·n·G + d²)·d per token",
)
class Yoso(GroupedLinear):
    """o_t = Σ f(q̂_t·k̂_s) v_s / ‖…‖ with f(x) = (1 - acos(x)/π)^τ, the chance that τ bits agree.

    f is no finite product of features, so exact weights need all keys. They are exact within reach;
    over closed groups f is its Taylor polynomial a + b x + c x², which is positive, deterministic and
    has 1 + 2 d + d²/2 features. A span over the whole text gives exact YOSO-E.
    """

    wide = True
    apart = True

    def sum_width(self) -> int:
        return 1 + self.head_width * (2 + self.head_width // 2)

    def near_features(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.mixer.kernel == "softmax" else unit(x)

    def in_group(self, products: torch.Tensor) -> torch.Tensor | None:
        cosines = products.clamp(-LARGEST_COSINE, LARGEST_COSINE)
        return (1 - cosines.acos() / math.pi) ** HASH_BITS

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
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

    def _far_blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        if start is not None or k.shape[2] > self.sum_width():
            return super()._far_blocks(q, k, v, start)
        return self._far_products(q, k, v)

    def _distant_blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, alone: bool
    ) -> torch.Tensor:
        if k.shape[2] > self.sum_width():
            return super()._distant_blocks(q, k, v, alone=alone)
        return self._far_products(q, k, v)

    def _far_products(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same from the cosines themselves: with fewer keys than features that is less work."""
        blocks = self._blocks(unit(q))
        cosines = blocks @ unit(k).mT[:, :, None]
        a, b, c = taylor_factors(HASH_BITS)
        # how many groups back a key lies; in an encoder, how many away
        key = torch.arange(k.shape[2], device=k.device) // self.mixer.group
        away = torch.arange(blocks.shape[2], device=k.device)[:, None, None] - key
        far = (away if self.config.causal else away.abs()) >= self.mixer.span
        return ((a + b * cosines + c * cosines.square()) * far) @ v[:, :, None]

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return unit(o)


def taylor_factors(bits: int) -> tuple[float, float, float]:
    """The factors a, b, c of (1/2 + asin(x)/π)^bits = a + b x + c x² + ..."""
    a = 0.5**bits
    b = bits * 0.5 ** (bits - 1) / math.pi
    c = math.comb(bits, 2) * 0.5 ** (bits - 2) / math.pi**2
    return a, b, c
