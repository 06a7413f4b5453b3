"""Random projections for the mixers that approximate a kernel by random features."""

from __future__ import annotations

import math

import torch

from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.normalized import Normalized

# exp(w·y - ‖y‖²/2) is at most exp(‖w‖²/2), and exp(80) is a float32
LONGEST_SQUARE = 160.0


def default_features(width: int) -> int:
    """d ln d, rounded up: how many features keep the error of the kernel small (arXiv 2009.14794)."""
    return max(2, math.ceil(width * math.log(width)))


def orthogonal_rows(count: int, width: int, seed: int) -> torch.Tensor:
    """[count, width] Gaussian rows whose directions are orthogonal within blocks of `width`."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def gaussian() -> torch.Tensor:
        return torch.randn(width, width, dtype=torch.float64, generator=generator, device="cpu")

    blocks = []
    for _ in range(-(-count // width)):
        # directions of one matrix, lengths of another: the rows stay Gaussian one by one
        lengths = gaussian().square().sum(1, keepdim=True).clamp_max(LONGEST_SQUARE).sqrt()
        blocks.append(torch.linalg.qr(gaussian())[0] * lengths)
    return torch.cat(blocks)[:count].float()


class RandomFeatures(Normalized):
    """Base of mixers whose features are functions of a fixed random projection.

    The projection is drawn from the mixer's seed once and kept in the checkpoint: another version of
    torch may draw other numbers from the same seed.
    """

    keeps_features = False
    projection: torch.Tensor

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.count = mixer.features or default_features(self.head_width)
        self.register_buffer("projection", orthogonal_rows(self.count, self.head_width, mixer.seed))

    def projected(self, x: torch.Tensor) -> torch.Tensor:
        """Products of x with the projection: [..., K] -> [..., m], float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        # features are exponentials or phases of these: bfloat16 would be off by tenths
        with torch.autocast(x.device.type, enabled=False):
            return x.to(wide) @ self.projection.to(wide).mT
