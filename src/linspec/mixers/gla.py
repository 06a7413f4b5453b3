"""Gated linear attention (Yang et al. 2024), its gates taken from the keys as in Liger (Lan et al. 2025)."""

from __future__ import annotations

import torch
from torch import nn

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.decaying import DecayingMixer, log_decay


@MIXERS.register(
    "gla",
    summary="softmax(q)·softmax(k) weights that fade per channel, as fast as the keys say",
    paper="Yang et al. 2024, arXiv 2312.06635; Lan et al. 2025 (Liger), arXiv 2503.01496",
    state="d² + 3·n·G·d per KV head",
    cost="(3·n·G + d)·d per token",
)
class Gla(DecayingMixer):
    """S_t = diag(a_t) S_{t-1} + φ(k_t) v_tᵀ, o_t = φ(q_t) S_t, φ = softmax over channels.

    a_t = sigmoid(scale · k_t + bias)^(1/16), per channel of the key before its rotation. scale starts
    at 1 and bias at 0, so that a converted checkpoint has gates at once.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.gate_scale = nn.Parameter(torch.ones(self.kv_heads, self.head_width))
        self.gate_bias = nn.Parameter(torch.zeros(self.kv_heads, self.head_width))

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not Gla:
            return None
        gates = {"gate_scale": self.gate_scale.detach(), "gate_bias": self.gate_bias.detach()}
        return self.summed_plan("softmax", "none", fades=True, **gates)

    def gate_widths(self) -> tuple[int, int]:
        return self.head_width, self.head_width

    def entry_gates(self, k: torch.Tensor) -> torch.Tensor | None:
        return log_decay(k * self.gate_scale + self.gate_bias)

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)
