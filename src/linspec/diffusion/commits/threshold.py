"""Everything that the model is sure enough of is decided at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import ORDERS, Candidates, highest
from linspec.errors import ConfigError
from linspec.utils.messages import quoted
from linspec.utils.options import option
from linspec.utils.sizes import check_choice


def check_threshold(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is a probability above 0."""
    if not 0 < value <= 1:
        raise ConfigError(f"{name} must be above 0 and at most 1, got {quoted(value)}")


@dataclass(frozen=True, slots=True)
class ThresholdOptions:
    """How sure."""

    least: float = option(
        "what a token needs to be decided, above 0 and up to 1", default=0.9, short=True
    )
    by: str = option(
        "confidence: the probability of the token; margin: what it is ahead of the next one",
        default="confidence",
    )

    def __post_init__(self) -> None:
        check_threshold("least", self.least)
        check_choice("by", self.by, ("confidence", "margin"))


@COMMITS.register(
    "threshold",
    summary="all tokens above a confidence, or a margin, and the best one in any case; approximate",
    paper="Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618",
    options=ThresholdOptions,
)
class Threshold(CommitPolicy):
    """A round decides one token at least, so a block never takes more forwards than tokens."""

    options: ThresholdOptions

    def commit(self, candidates: Candidates) -> Tensor:
        scores = ORDERS[self.options.by](candidates)
        return (scores >= self.options.least) | highest(scores, 1)
