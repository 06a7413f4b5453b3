"""Grouped linear attention (You et al. 2024): local weights plus a learned share of a linear sum."""

from __future__ import annotations

import torch
from torch import nn

from linspec.kernels.step_plan import AttentionPlan, SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.linear import LinearMixer


@MIXERS.register(
    "grouped",
    summary="local attention + α · linear attention over earlier groups",
    paper="You et al. 2024, arXiv 2406.07368",
    state="d² + 2·n·G·d per KV head",
    cost="(2·n·G + d)·d per token",
)
class Grouped(LinearMixer):
    """o_t = local(t) + α q̂_t S_t, α a scalar learned per layer."""

    biased = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        # α = 0 at the start: with α = 1 the unnormalized sum drowns the local part (paper, fig. 6b)
        self.alpha = nn.Parameter(torch.zeros(()))

    def attention_plan(self) -> AttentionPlan | SummedPlan | None:
        return self.grouped_plan(float(self.alpha)) if type(self) is Grouped else None

    def sum_scale(self) -> torch.Tensor | float:
        return self.alpha
