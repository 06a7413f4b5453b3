"""Typical acceptance (Medusa): keep every draft token that the target finds plausible.

Lossy: the output does not have the target's distribution. It trades that for longer accepted paths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from linspec.decoding.accepted import Accepted, path_tokens
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError
from linspec.utils.options import option
from linspec.verifiers.base import VERIFIERS, check_logits, conclude
from linspec.verifiers.greedy import GreedyVerifier


@dataclass(frozen=True, slots=True)
class TypicalOptions:
    """When a draft token is plausible."""

    epsilon: float = option("probability that is always enough, in 0..1", default=0.09)
    delta: float = option("share of exp(-entropy) that is enough, in 0..1", default=0.3)

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not 0 < value < 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {value}")


@VERIFIERS.register(
    "typical",
    summary="keep draft tokens above an entropy-dependent threshold; changes the distribution",
    paper="Medusa, Cai et al. 2024, arXiv 2401.10774",
    lossless="no",
    options=TypicalOptions,
)
class TypicalVerifier:
    """Keeps token x iff p(x) > min(epsilon, delta * exp(-H(p))), with the entropy H in nats.

    At temperature 0 p is a point mass, for which this is the greedy rule.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    divides: ClassVar[bool] = False
    matches: ClassVar[Literal["", "greedy", "all"]] = "greedy"

    def __init__(self, options: TypicalOptions | None = None) -> None:
        self.options = options or TypicalOptions()

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """Take the deepest plausible path, the likeliest of several, and draw the bonus token."""
        if sampler.greedy:
            return GreedyVerifier().accept(tree, logits, sampler)
        check_logits(tree, logits)
        plausible = self._plausible(tree, logits, sampler)
        best = max(plausible, key=lambda node: (tree.depths[node], plausible[node]))
        path = tree.path_to(best)
        bonus = sampler.draw(sampler.probabilities(logits[best], path_tokens(tree, path)))
        return conclude(tree, logits, sampler, path, bonus)

    def _plausible(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> dict[int, float]:
        """Log-probability of the path to every node whose path is plausible throughout."""
        found = {0: 0.0}
        for node, children in enumerate(tree.children):
            if node not in found or not children:
                continue
            drafts = path_tokens(tree, tree.path_to(node))
            p = sampler.probabilities(logits[node], drafts)
            threshold = self.threshold(p)
            for child in children:
                chance = float(p[tree.tokens[child]])
                if chance > threshold:
                    found[child] = found[node] + math.log(chance)
        return found

    def threshold(self, p: Tensor) -> float:
        """The probability that a draft token must exceed under `p` [V]."""
        entropy = float(torch.special.entr(p).sum())
        return min(self.options.epsilon, self.options.delta * math.exp(-entropy))
