"""LocalLeap: next to tokens that are certain, a lower confidence is enough."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import Candidates, highest
from linspec.diffusion.commits.threshold import check_threshold
from linspec.errors import ConfigError
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class LocalLeapOptions:
    """Two thresholds, and how far the lower one reaches."""

    sure: float = option("confidence of an anchor, above 0 and up to 1", default=0.9)
    near: float = option("confidence that is enough beside an anchor, up to `sure`", default=0.75)
    radius: int = option("positions to either side of an anchor", default=4)

    def __post_init__(self) -> None:
        check_threshold("sure", self.sure)
        check_threshold("near", self.near)
        check_size("radius", self.radius, least=0)
        if self.near > self.sure:
            raise ConfigError(
                f"near must be at most sure, got {self.near} and {self.sure}; lower it, or use the policy "
                "'threshold'"
            )


@COMMITS.register(
    "local-leap",
    summary="a threshold, and a lower one beside the tokens that pass it; approximate",
    paper="Kong et al. 2025, arXiv 2510.07081",
    options=LocalLeapOptions,
)
class LocalLeap(CommitPolicy):
    """Anchors are the undecided positions that pass the threshold in this very round."""

    options: LocalLeapOptions

    def commit(self, candidates: Candidates) -> Tensor:
        confidence, at = candidates.confidence, candidates.positions
        anchors = confidence >= self.options.sure
        close = (at[:, None] - at[anchors]).abs() <= self.options.radius
        leaps = close.any(1) & (confidence >= self.options.near)
        return anchors | leaps | highest(confidence, 1)
