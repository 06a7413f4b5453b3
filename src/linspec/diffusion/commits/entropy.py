"""Everything whose distribution is narrow enough is decided at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linspec.diffusion.base import COMMITS, CommitPolicy
from linspec.diffusion.candidates import Candidates, highest
from linspec.utils.options import option
from linspec.utils.sizes import check_positive


@dataclass(frozen=True, slots=True)
class EntropyOptions:
    """How narrow."""

    most: float = option("nats of a distribution that is narrow enough", default=0.1, short=True)

    def __post_init__(self) -> None:
        check_positive("most", self.most, zero=True)


@COMMITS.register(
    "entropy",
    summary="all tokens whose distribution has little entropy, and the least one in any case; approximate",
    paper="Ye et al. 2025 (Dream), arXiv 2508.15487",
    options=EntropyOptions,
)
class Entropy(CommitPolicy):
    """Asks the whole distribution, where `threshold` asks one token."""

    options: EntropyOptions

    def commit(self, candidates: Candidates) -> Tensor:
        entropy = candidates.entropy
        return (entropy <= self.options.most) | highest(-entropy, 1)
