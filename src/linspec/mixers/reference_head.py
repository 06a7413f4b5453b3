"""What the specifications of mixers are given, and the softmax that many of them end in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from linspec.mixers.base import Mixer
from linspec.mixers.config import MixerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Which head a reference computes, and what it may need of its mixer.

    unrotated [T, K]: keys before the rotary embedding. sharing: queries [T, K] of all heads with these keys.
    """

    mixer: Mixer
    query: int
    shared: int
    unrotated: torch.Tensor
    sharing: tuple[torch.Tensor, ...]

    @property
    def config(self) -> MixerConfig:
        return self.mixer.mixer

    def own(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the mixer."""
        found: torch.Tensor = getattr(self.mixer, name)
        return found

    def first(self, t: int) -> int:
        """The oldest position within reach of t: the start of the group span - 1 before its own."""
        return max(0, (t // self.config.group - self.config.span + 1) * self.config.group)


def softmax_over(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: Callable[[int, int], bool]
) -> torch.Tensor:
    """Softmax of each query t over the rows s <= t that it sees."""
    out = []
    for t in range(len(q)):
        seen = [s for s in range(t + 1) if sees(t, s)]
        scores = torch.stack([q[t] @ k[s] / math.sqrt(q.shape[1]) for s in seen])
        weights = (scores - scores.max()).exp()
        out.append(weights @ v[seen] / weights.sum())
    return torch.stack(out)
