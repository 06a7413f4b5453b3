"""A decoder's block whose norms or residual sums are arranged in another way than in Llama.

norms 'behind'    x + norm(mixer(x))                 OLMo 2
norms 'both'      x + norm(mixer(norm(x)))           Gemma 2 and 3
parallel          x + mixer(norm(x)) + mlp(norm(x))  GPT-NeoX; one norm for both: StableLM
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from linspec.mixers.base import Rope
from linspec.mixers.norms import make_norm
from linspec.models.block import Block
from linspec.models.config import DecoderConfig
from linspec.models.norm import inference_norm
from linspec.state.dense_group import DenseGroup


class ArrangedBlock(Block):
    """Mixer and MLP in the arrangement that `norms`, `residual` and `residual_scale` name."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.parallel = config.residual != "sequential"
        self.shared = config.residual == "parallel-shared"
        self.scale = config.residual_scale
        if config.norms == "behind":
            self.mixer_norm = nn.Identity()
        if config.norms == "behind" or self.shared:
            self.mlp_norm = nn.Identity()
        self.mixer_out_norm: nn.Module = nn.Identity()
        self.mlp_out_norm: nn.Module = nn.Identity()
        if config.norms != "before":
            self.mixer_out_norm, self.mlp_out_norm = make_norm(config), make_norm(config)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        normed = self.mixer_norm(x)
        return self._summed(x, normed, self.mixer(normed, rope))

    def _summed(self, x: torch.Tensor, normed: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """What leaves the block, from what enters it, the mixer's input and its output."""
        mixer_sum = x + self._scaled(self.mixer_out_norm(mixed))
        fed = normed if self.shared else self.mlp_norm(x if self.parallel else mixer_sum)
        return mixer_sum + self._scaled(self.mlp_out_norm(self.mlp(fed)))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.scale == 1.0 else x * self.scale

    def finalize_weights(self) -> None:
        super().finalize_weights()
        self.mixer_out_norm = inference_norm(self.mixer_out_norm)
        self.mlp_out_norm = inference_norm(self.mlp_out_norm)

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: Any,
        layer: int,
    ) -> torch.Tensor:
        normed = self.mixer_norm(x)
        return self._summed(x, normed, self.mixer.step(normed, rope, dense_groups, state, layer))
