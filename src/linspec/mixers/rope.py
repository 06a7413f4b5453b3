"""Rotary position embedding (Su et al. 2021, RoFormer), and its scalings for longer texts."""

from __future__ import annotations

import math

import torch

from linspec.kernels.rotary import rotary_factors
from linspec.mixers.rope_config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_width: int) -> torch.Tensor:
    """Angular frequency of every feature pair that turns, in float32: [R/2]."""
    turned = config.turned(head_width)
    exponent = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
    freq = 1.0 / config.theta**exponent
    if config.kind == "linear":
        return freq / config.factor
    if config.kind == "llama3":
        return _llama3(freq, config)
    if config.kind == "yarn":
        return _yarn(freq, config)
    if config.kind == "longrope":
        return freq / torch.tensor(config.long_factors if config.long else config.short_factors)
    return freq


def _llama3(freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, the band between is blended."""
    wavelength = 2 * math.pi / freq
    turns = config.original_max_positions / wavelength
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return freq * (keep + (1 - keep) / config.factor)


def _yarn(freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """As `_llama3`, but blended by the number of the pair (Peng et al. 2023, arXiv 2309.00071)."""
    width = 2 * len(freq)

    def pair(turns: float) -> float:
        """The pair that makes so many turns within the original positions."""
        length = config.original_max_positions / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(config.theta))

    first: float
    first, last = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    stretch = ((torch.arange(len(freq)).float() - first) / (last - first)).clamp(0.0, 1.0)
    return freq / config.factor * stretch + freq * (1 - stretch)


class Rotary(torch.nn.Module):
    """Turns positions into the pair of factors that `rotate` takes."""

    def __init__(self, config: RopeConfig, head_width: int) -> None:
        super().__init__()
        self.config = config
        self.head_width = head_width

    def forward(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, ∓sin), each of shape positions.shape + [1, R], for all heads of a position.

        The sign of the second belongs to the halves that `rotate` swaps. Angles are float32.
        """
        freq = inverse_frequencies(self.config, self.head_width).to(positions.device)
        cosines, sines = rotary_factors(freq, positions, self.config.attention_factor)
        return cosines.to(dtype)[..., None, :], sines.to(dtype)[..., None, :]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by its position's angles; halves are paired as in Llama checkpoints.

    Features behind as many as there are factors stay as they are.
    """
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], cos, sin), x[..., turned:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
