"""TransNormer (Qin et al. 2022): linear attention whose output is normalized, not its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.linear import LinearMixer
from linspec.mixers.ops.exact import Exact
from linspec.mixers.ops.features import same
from linspec.mixers.ops.parts import weigh_features

RMS_FLOOR = 1e-6


@MIXERS.register(
    "transnormer",
    summary="(elu(q) + 1)·(elu(k) + 1) weights over all tokens, RMSNorm on the output",
    paper="Qin et al. 2022, arXiv 2210.10340",
    state="d² + 2·n·G·d per KV head",
    cost="(2·n·G + d)·d per token",
)
class TransNormer(LinearMixer):
    """o_t = gain · RMSNorm(φ(q_t)·Σ φ(k_s) v_sᵀ), φ = 1 + elu; one gain per channel."""

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.gain = nn.Parameter(torch.ones(self.head_width))

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not TransNormer:
            return None
        gain = self.gain.detach()
        return self.summed_plan("elu_plus_1", "products", end="rms", floor=RMS_FLOOR, gain=gain)

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(x) + 1

    def own_exact(self) -> Exact | None:
        return weigh_features(self.summed, same)

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(o, (self.head_width,), self.gain.to(o.dtype), RMS_FLOOR)
