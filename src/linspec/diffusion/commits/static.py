"""A block is filled in a number of forwards that is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import ORDERS, Candidates, check_order, highest
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class StaticOptions:
    """In how many forwards, and what first."""

    steps: int | None = option(
        "forwards of a block; none for one a token, which is the most accurate", default=None
    )
    order: str = option(
        "what is decided first: confidence, margin, entropy, random or left", default="confidence"
    )

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_size("steps", self.steps)
        check_order("order", self.order)


@COMMITS.register(
    "static",
    summary="a fixed number of forwards a block; with one a token the reference of all others",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992; Ye et al. 2025 (Dream), arXiv 2508.15487",
    options=StaticOptions,
)
class Static(CommitPolicy):
    """Forwards take equal shares; the first ones take one token more where these do not come out even."""

    options: StaticOptions

    def commit(self, candidates: Candidates) -> Tensor:
        left = len(candidates.positions)
        steps = left if self.options.steps is None else self.options.steps - candidates.canvas.step
        return highest(ORDERS[self.options.order](candidates), -(-left // max(1, steps)))
