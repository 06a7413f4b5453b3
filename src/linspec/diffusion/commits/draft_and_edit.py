"""Decide early, and replace what the model no longer stands by once it sees more of the block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import Candidates, highest
from linspec.diffusion.commits.threshold import check_threshold
from linspec.errors import ConfigError
from linspec.utils.messages import quoted
from linspec.utils.options import option


@dataclass(frozen=True, slots=True)
class DraftAndEditOptions:
    """Two thresholds: what is enough to be decided, and what is too little to stay."""

    least: float = option(
        "confidence that a token needs to be decided, above 0 and up to 1", default=0.5
    )
    keep: float = option(
        "probability below which a decided token is replaced, from 0 (never) to `least`",
        default=0.3,
    )

    def __post_init__(self) -> None:
        check_threshold("least", self.least)
        if not 0 <= self.keep <= self.least:
            raise ConfigError(
                f"keep must be from 0 to least, which is {self.least}, got {quoted(self.keep)}; a token that "
                "is just good enough to be decided would be replaced at once"
            )


@COMMITS.register(
    "draft-and-edit",
    summary="a low threshold; tokens of the block that become unlikely are replaced; approximate",
    paper="-",
    options=DraftAndEditOptions,
)
class DraftAndEdit(CommitPolicy):
    """A full block is looked at once more before it goes out, so it costs a forward more than `threshold`."""

    options: DraftAndEditOptions

    def __init__(self, options: DraftAndEditOptions) -> None:
        super().__init__(options)
        self.edits = options.keep > 0

    def commit(self, candidates: Candidates) -> Tensor:
        confidence = candidates.confidence
        return (confidence >= self.options.least) | highest(confidence, 1)

    def edit(self, decided: Candidates) -> Tensor:
        return decided.confidence < self.options.keep
