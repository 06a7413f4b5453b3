"""As many tokens as are sure together: the more there are, the surer each has to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import Candidates, highest
from linspec.utils.options import option
from linspec.utils.sizes import check_positive


@dataclass(frozen=True, slots=True)
class FactorOptions:
    """How much doubt n tokens may share."""

    factor: float = option(
        "n tokens are decided while (n + 1) times the doubt of the n-th is below it",
        default=1.0,
        short=True,
    )

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)


@COMMITS.register(
    "factor",
    summary="the most tokens whose doubts stay small together, one at least; approximate",
    paper="Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618",
    options=FactorOptions,
)
class Factor(CommitPolicy):
    """If each of n tokens has a doubt below 1 / (n + 1), all of them are the likeliest tokens jointly too."""

    options: FactorOptions

    def commit(self, candidates: Candidates) -> Tensor:
        doubts = 1 - candidates.confidence.sort(descending=True).values
        counts = torch.arange(1, len(doubts) + 1)
        fits = (counts + 1) * doubts < self.options.factor
        return highest(candidates.confidence, int((fits * counts).max().clamp_min(1)))
