"""FLASH (Hua et al. 2022, arXiv 2202.10447) as You et al. 2024 train it: gated attention units only.

    model = Flash(FlashConfig(vocab_size=4096, width=256, layers=6, eos_ids=(0,)))

A decoder like the others: the same steps, trees, drafters and files. There is no softmax checkpoint
to come from; `linspec pretrain --recipe flash-aug` trains one from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from linspec.mixers.base import Rope
from linspec.mixers.projections import LinearFactory
from linspec.mixers.rope import Rotary, inverse_frequencies
from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.models.flash_config import FlashConfig
from linspec.models.gau import GatedAttentionUnit, TokenShift
from linspec.state.contract import Makers
from linspec.state.dense_group import DenseGroup
from linspec.state.sequence_states import MixedState


class ScaleNorm(nn.Module):
    """x / rms(x) times one learned scalar (Nguyen & Salazar 2019, arXiv 1910.05895)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rms = x.square().mean(-1, keepdim=True).sqrt()
        return x / rms.clamp_min(self.eps) * self.scale


class FlashBlock(Block):
    """x + unit(shift(norm(x)))."""

    def __init__(self, config: FlashConfig) -> None:
        nn.Module.__init__(self)
        self.mixer_norm: nn.Module = ScaleNorm(config.norm_eps)
        self.shift = TokenShift(config.width)
        self.mixer = GatedAttentionUnit(config)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        return x + self.mixer(self.shift(self.mixer_norm(x)), rope)

    def state_makers(self) -> Makers:
        return self.mixer.state_makers(), self.shift

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: Any,
        layer: int,
    ) -> torch.Tensor:
        assert isinstance(state, MixedState), "a unit and a shift"
        unit, shift = state.parts
        shifted = self.shift.step(self.mixer_norm(x), dense_groups, *shift)
        return x + self.mixer.step(shifted, rope, dense_groups, *unit)

    def to_inference(self, linear_factory: LinearFactory) -> None:
        self.mixer.to_inference(linear_factory)

    def finalize_weights(self) -> None:
        self.mixer.finalize_weights()


class Flash(Decoder):
    """Token ids in, logits out."""

    config: FlashConfig

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.rotary = Rotary(config.rope, config.turned)
        # sinusoids are added at the size of the embeddings, which start small
        self.wave_scale = nn.Parameter(torch.full((), config.width**-0.5))

    def make_block(self, layer: int) -> Block:
        return FlashBlock(self.config)

    @property
    def units(self) -> list[FlashBlock]:
        """The blocks, first to last."""
        return [block for block in self.blocks if isinstance(block, FlashBlock)]

    def enter(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        given: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> tuple[torch.Tensor, list[Rope]]:
        # embeddings of a quantized model are narrower
        x = self.embedded(ids, given).to(self.dtype)
        freq = inverse_frequencies(self.config.rope, self.config.width).to(positions.device)
        angle = positions[..., None].float() * freq
        waves = torch.cat((angle.sin(), angle.cos()), dim=-1).to(x.dtype)
        rope = self.rotary(positions, x.dtype)
        return x + self.wave_scale * waves, [rope] * self.config.layers
