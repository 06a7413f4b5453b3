"""A block is filled in a number of forwards that is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import (
    KNOWN_ORDERS,
    ORDERS,
    Candidates,
    check_order,
    highest,
    known_order,
)
from linspec.diffusion.canvas import Canvas
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
        return highest(ORDERS[self.options.order](candidates), self._share(candidates.canvas))

    @property
    def knows_ahead(self) -> bool:
        return self.options.order in KNOWN_ORDERS

    def ahead(self, canvas: Canvas) -> Sequence[int]:
        if canvas.end is None or not self.knows_ahead:
            return ()
        return known_order(self.options.order, canvas)[: self._share(canvas)]

    def _share(self, canvas: Canvas) -> int:
        """How many tokens this forward of the block decides."""
        left = len(canvas.open)
        steps = left if self.options.steps is None else self.options.steps - canvas.step
        return -(-left // max(1, steps))
