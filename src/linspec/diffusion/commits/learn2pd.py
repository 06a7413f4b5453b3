"""Learn2PD: a small trained network says which predictions of a block will not change any more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from linspec.decoding.target import Target
from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import Candidates, highest
from linspec.diffusion.commits.threshold import check_threshold
from linspec.diffusion.filters import FOLDER, load_filter
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.utils.options import option


@dataclass(frozen=True, slots=True)
class Learn2PDOptions:
    """Where the network is, and how sure it must be."""

    least: float = option(
        "what the filter must say of a token, above 0 and up to 1", default=0.96, short=True
    )
    path: Path | None = option(
        f"directory of the filter; none for {FOLDER} in that of the model", default=None
    )

    def __post_init__(self) -> None:
        check_threshold("least", self.least)


@COMMITS.register(
    "learn2pd",
    summary="all tokens that a trained filter takes for final, and the surest one; approximate",
    paper="Bao et al. 2025, arXiv 2509.25188",
    options=Learn2PDOptions,
)
class Learn2PD(CommitPolicy):
    """Reads the confidences of the whole block; a round decides one token at least."""

    options: Learn2PDOptions
    whole = True

    def attached(self, target: Target) -> None:
        path, model = self.options.path, target.model
        if path is None and target.source is not None:
            path = target.source / FOLDER
        if path is None:
            raise ConfigError(
                "commit policy 'learn2pd': a model given in memory has no directory with its filter; "
                "name it: commit=learn2pd:path=DIRECTORY"
            )
        assert isinstance(model, Decoder), "the loop takes masked-diffusion models"
        self.filter = load_filter(path, model)

    def commit(self, candidates: Candidates) -> Tensor:
        block = candidates.canvas.block
        if len(block) > self.filter.block:
            raise ConfigError(
                f"the filter of commit policy 'learn2pd' knows blocks of {self.filter.block} positions, and "
                f"this one has {len(block)}; use block=fixed:{self.filter.block}, or train another filter"
            )
        confidences = candidates.predictions.logits(block).softmax(-1).amax(-1)
        accepted = self.filter.accepted(confidences, self.options.least)
        return accepted[candidates.positions - block.start] | highest(candidates.confidence, 1)
