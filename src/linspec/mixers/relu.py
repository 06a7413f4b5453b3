"""ReLU linear attention (Cai et al. 2023, EfficientViT): a normalized kernel attention."""

from __future__ import annotations

import torch

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.normalized import Normalized


@MIXERS.register(
    "relu",
    summary="relu(q)·relu(k) weights over all tokens, normalized",
    paper="Cai et al. 2023 (EfficientViT), arXiv 2205.14756",
    state="d² + d + n·G·(2·d + 1) per KV head",
    cost="(2·n·G + d)·d per token",
)
class Relu(Normalized):
    """o_t = φ(q_t)·Σ φ(k_s) v_sᵀ / (φ(q_t)·Σ φ(k_s) + ε), φ = relu.

    With its own kernel, groups change nothing in the result; they only batch the updates of the sum.
    """

    def attention_plan(self) -> SummedPlan | None:
        return self.quotient_plan("relu") if type(self) is Relu else None

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()
