"""ReLU linear attention (Cai et al. 2023, EfficientViT): a normalised kernel attention."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from linspec.config import MixerConfig, StackConfig
from linspec.errors import ConfigError
from linspec.mixers.base import MIXERS
from linspec.mixers.linear import GroupedLinear
from linspec.state import RowSpec

DENOMINATOR_FLOOR = 1e-6


@MIXERS.register(
    "relu",
    summary="relu(q)·relu(k) weights over all tokens, normalised",
    paper="Cai et al. 2023 (EfficientViT), arXiv 2205.14756",
    state="d² + d + 2·G·d per KV head",
)
class Relu(GroupedLinear):
    """o_t = φ(q_t)·Σ φ(k_s) v_sᵀ / (φ(q_t)·Σ φ(k_s) + ε), φ = relu.

    Groups change nothing in the result; they only batch the updates of the sum. The denominator is
    one more value column that is always 1.
    """

    # its weights are divided by their sum, which a bias of either sign could bring to zero
    biased = False

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if mixer.kernel != "own":
            raise ConfigError(f"mixer '{mixer.name}' has one kernel, its own; got {mixer.kernel!r}")
        super().__init__(config, mixer)

    def row_spec(self) -> RowSpec:
        return replace(super().row_spec(), value_width=self.head_width + 1)

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    def row_values(self, v: torch.Tensor) -> torch.Tensor:
        return F.pad(v, (0, 1), value=1.0)

    def in_group(self, products: torch.Tensor) -> torch.Tensor | None:
        return products

    def sum_scale(self) -> float:
        return 1.0

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return o[..., :-1] / (o[..., -1:] + DENOMINATOR_FLOOR)
