"""FLASH-global attention (Hua et al. 2022): a linear sum over earlier groups, own group unseen."""

from __future__ import annotations

import torch
from torch import nn

from linspec.errors import ConfigError
from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.linear import LinearMixer
from linspec.mixers.options import GroupOptions


@MIXERS.register(
    "global",
    summary="linear attention over earlier groups only",
    paper="Hua et al. 2022 (FLASH), arXiv 2202.10447",
    state="d² + 2·G·d per KV head",
    cost="(2·G + d)·d per token",
    options=GroupOptions,
)
class Global(LinearMixer):
    """o_t = α q̂_t S_g(t); α starts at 1, as nothing else carries information."""

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if mixer.span > 1 or mixer.kernel != "own":
            raise ConfigError(
                f"mixer 'global' sees no group exactly: span {mixer.span} and kernel "
                f"{mixer.kernel!r} mean nothing to it; leave them out, or use mixer 'grouped'"
            )
        super().__init__(config, mixer)
        self.alpha = nn.Parameter(torch.ones(()))

    def attention_plan(self) -> SummedPlan | None:
        return self.summed_plan("unit", "none") if type(self) is Global else None

    def sum_scale(self) -> torch.Tensor | float:
        return self.alpha

    def own_exact(self) -> None:
        return None
