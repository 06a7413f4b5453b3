"""Rotary position embedding (Su et al. 2021, RoFormer), with the linear and Llama-3 scalings."""

from __future__ import annotations

import math

import torch

from linspec.kernels.rotary import rotary_factors
from linspec.mixers.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_width: int) -> torch.Tensor:
    """Angular frequency of every feature pair in float32: [K/2]."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
    freq = 1.0 / config.theta**exponent
    if config.kind == "linear":
        return freq / config.factor
    if config.kind == "llama3":
        return _llama3(freq, config)
    return freq


def _llama3(freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, the band between is blended."""
    wavelength = 2 * math.pi / freq
    turns = config.original_max_positions / wavelength
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return freq * (keep + (1 - keep) / config.factor)


class Rotary(torch.nn.Module):
    """Turns positions into the pair of factors that `rotate` takes."""

    def __init__(self, config: RopeConfig, head_width: int) -> None:
        super().__init__()
        self.config = config
        self.head_width = head_width

    def forward(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, ∓sin), each of shape positions.shape + [1, K], for all heads of a position.

        The sign of the second belongs to the halves that `rotate` swaps. Angles are float32.
        """
        freq = inverse_frequencies(self.config, self.head_width).to(positions.device)
        cosines, sines = rotary_factors(freq, positions)
        return cosines.to(dtype)[..., None, :], sines.to(dtype)[..., None, :]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by its position's angles; halves are paired as in Llama checkpoints."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
