"""Gated delta rule (Yang et al. 2025, Gated DeltaNet): a fading state that overwrites what it knows."""

from __future__ import annotations

import torch
from torch import nn

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.decaying import DecayingMixer, log_decay
from linspec.mixers.ops.decayed import Writes
from linspec.mixers.ops.delta import delta_writes


@MIXERS.register(
    "gdn",
    summary="a state that fades and corrects what it returns for a key, gates taken from the keys",
    paper="Yang et al. 2025, arXiv 2412.06464",
    state="d² + n·G·(2·d + 2) per KV head",
    cost="(3·n·G + d)·d per token + (n·G)²·d per step",
)
class Gdn(DecayingMixer):
    """S_t = a_t S_{t-1} + k̂_t u_tᵀ, u_t = b_t (v_t - a_t S_{t-1}ᵀ k̂_t), o_t = q̂_t S_t.

    a_t = sigmoid(x)^(1/16) and b_t = sigmoid(y) are scalars; x and y are learned projections of the key
    before its rotation, which start at 3 and 0 for every key. The u of all tokens of a chunk or a tree
    solve one triangular system.
    """

    chunk = 32

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.gate_map = nn.Parameter(torch.zeros(self.kv_heads, self.head_width, 2))
        # sigmoid(3)^(1/16): half of a state is left after 230 tokens
        self.gate_bias = nn.Parameter(torch.tensor((3.0, 0.0)).repeat(self.kv_heads, 1))

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not Gdn:
            return None
        gates = {"gate_map": self.gate_map.detach(), "gate_bias": self.gate_bias.detach()}
        return self.summed_plan("unit", "none", fades=True, delta=True, **gates)

    def entry_gates(self, k: torch.Tensor) -> torch.Tensor | None:
        decay, rate = ((k.unsqueeze(-2) @ self.gate_map).squeeze(-2) + self.gate_bias).unbind(-1)
        return torch.stack((log_decay(decay), rate.sigmoid()), dim=-1)

    def gate_widths(self) -> tuple[int, int]:
        return 1, 2

    def writes(self) -> Writes:
        return delta_writes
