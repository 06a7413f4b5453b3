"""Augmented linear attention (You et al. 2024): grouped attention with a masked convolution."""

from __future__ import annotations

from linspec.errors import ConfigError
from linspec.kernels.step_plan import AttentionPlan, SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.grouped import Grouped


@MIXERS.register(
    "aug",
    summary="grouped attention + causal depthwise convolution over values",
    paper="You et al. 2024, arXiv 2406.07368",
    state="d² + 2·n·G·d + (W-1)·d per KV head",
    cost="(2·n·G + d + W)·d per token",
)
class Aug(Grouped):
    """o_t = local(t) + α q̂_t S_t + sum_j c_j v_{t-j}, one kernel c per query head."""

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if mixer.taps < 1:
            raise ConfigError(
                f"mixer 'aug' needs convolution taps, got {mixer.taps}; use 32, or mixer 'grouped'"
            )
        super().__init__(config, mixer)

    def attention_plan(self) -> AttentionPlan | SummedPlan | None:
        return self.grouped_plan(float(self.alpha)) if type(self) is Aug else None
