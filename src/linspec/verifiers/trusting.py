"""Take drafts that their drafter is sure of, whatever the target says of them (lexical unit decoding).

Lossy: the output is what the drafter says where it is sure. Drafts without confidences are judged exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from linspec.decoding.accepted import Accepted, path_tokens
from linspec.decoding.likeliest import likeliest_token
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError
from linspec.utils.options import option
from linspec.verifiers.base import VERIFIERS, check_logits, conclude
from linspec.verifiers.lossless import LosslessVerifier


@dataclass(frozen=True, slots=True)
class TrustingOptions:
    """What is trusted."""

    threshold: float = option(
        "least confidence that is trusted; above 1 trusts nothing", default=0.9
    )

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"threshold must be above 0, got {self.threshold}; 0.9 is usual")


@VERIFIERS.register(
    "trusting",
    summary="take drafts that the drafter is sure of unseen; changes the output",
    paper="Sun et al. 2024 (LUD), arXiv 2405.15208",
    lossless="no",
    options=TrustingOptions,
)
class TrustingVerifier:
    """Follows the surest child as long as it is sure enough; what comes behind is the target's own."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    divides: ClassVar[bool] = True
    matches: ClassVar[Literal["", "greedy", "all"]] = ""

    def __init__(self, options: TrustingOptions | None = None) -> None:
        self.options = options or TrustingOptions()
        self._exact = LosslessVerifier()

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """The trusted path and the target's token behind it."""
        sure = tree.confidences
        if sure is None or tree.proposals:
            return self._exact.accept(tree, logits, sampler)
        check_logits(tree, logits)
        path = [0]
        while tree.children[path[-1]]:
            best = max(tree.children[path[-1]], key=sure.__getitem__)
            if sure[best] < self.options.threshold:
                break
            path.append(best)
        drafts, row = path_tokens(tree, path), logits[path[-1]]
        if sampler.greedy:
            token = likeliest_token(sampler.scores(row, drafts))
        else:
            token = sampler.draw(sampler.probabilities(row, drafts))
        return conclude(tree, logits, sampler, tuple(path), token)
