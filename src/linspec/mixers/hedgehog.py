"""Hedgehog feature maps with a softmax window (Zhang et al. 2024, LoLCATs): learned, normalized jointly."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.normalized import Normalized
from linspec.mixers.ops.exact import Exact, capped
from linspec.mixers.ops.features import two_sided_softmax


@MIXERS.register(
    "hedgehog",
    summary="softmax weights within the span + learned softmax features over earlier groups, normalized",
    paper="Zhang et al. 2024 (LoLCATs), arXiv 2410.10254; 2024 (Hedgehog), arXiv 2402.04347",
    state="2·d² + 2·d + n·G·(2·d + 1) per KV head",
    cost="(2·n·G + 6·d)·d per token",
)
class Hedgehog(Normalized):
    """o_t = (Σ_exact e_s v_s + Σ_summed w_s v_s) / (Σ_exact e_s + Σ_summed w_s).

    e_s = exp(q_t·k_s / sqrt(K) - the largest of them) and w_s = exp(γ) φ(q_t)·φ(k_s), with
    φ(x) = [softmax(W x), softmax(-W x)]. W is learned per head, for queries and keys apart, and starts
    at the identity; γ is learned per query head.
    """

    keeps_features = False

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        identity = torch.eye(self.head_width)
        self.query_map = nn.Parameter(identity.repeat(self.heads, 1, 1))
        self.key_map = nn.Parameter(identity.repeat(self.kv_heads, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(self.heads))

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not Hedgehog:
            return None
        maps = {"query_map": self.query_map.detach(), "key_map": self.key_map.detach()}
        factors = self.gamma.detach().exp()
        return self.quotient_plan("two_sided", "exponentials", query_factors=factors, **maps)

    def sum_width(self) -> int:
        return 2 * self.head_width

    def summed_queries(self, q: torch.Tensor) -> torch.Tensor:
        shares = (self.kv_heads, self.repeats)
        features = two_sided_softmax(q @ self.query_map.unflatten(0, shares).mT)
        return features * self.gamma.exp().view(*shares, 1, 1)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        return two_sided_softmax(k @ self.key_map.mT)

    def own_exact(self) -> Exact | None:
        config = self.config
        return Exact(partial(relative_exponentials, scale=config.score_scale, cap=config.score_cap))


# exp(score) of the lowest score that can be subtracted still fits in float16
LOWEST_SCORE = -1e4


def relative_exponentials(
    products: torch.Tensor,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    cap: float = 0.0,
) -> torch.Tensor:
    """exp(scores - the largest): a softmax without its denominator."""
    scores = capped(products * scale, cap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    # nodes that fill up a ragged batch see nothing: their largest score is no number to subtract
    return (scores - scores.amax(-1, keepdim=True).clamp_min(LOWEST_SCORE)).exp()
