"""A mixer or an MLP that a decoder has and does not compute."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import nn

from linspec.mixers.contract import MixerContract
from linspec.state.contract import Makers

M = TypeVar("M", bound=nn.Module)


class Skipped(nn.Module):
    """Stands in the place of `whole` and adds nothing to the residual; it stages nothing either."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole: nn.Module = whole

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.zeros_like(x)

    def step(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """The step form, which is the same."""
        return torch.zeros_like(x)

    def state_makers(self) -> Makers:
        """A state stays that of all layers."""
        return cast(MixerContract, self.whole).state_makers()


def whole(part: M) -> M:
    """`part`, or what it stands for."""
    return cast(M, part.whole) if isinstance(part, Skipped) else part
