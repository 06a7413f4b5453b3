"""Greedy verification: the output is the target's own greedy decode, token for token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from linspec.decoding.accepted import Accepted
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError
from linspec.verifiers.base import VERIFIERS, Rule, walk


@VERIFIERS.register(
    "greedy",
    summary="keep a draft token iff it is the target's argmax; temperature 0 only",
    paper="Stern et al. 2018, arXiv 1811.03115",
    lossless="yes",
)
class GreedyVerifier:
    """Exact for requests at temperature 0; raises ConfigError for any other."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    divides: ClassVar[bool] = False

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """Descend while a child carries the argmax of its parent's scores."""
        if not sampler.greedy:
            raise ConfigError(
                f"the greedy verifier cannot sample at temperature {sampler.params.temperature}. "
                "Use the verifier 'lossless', or temperature 0."
            )
        rule = argmax_of_all(logits) if sampler.plain else argmax_of_scores(logits, sampler)
        return walk(tree, logits, sampler, rule)


def argmax_of_scores(logits: Tensor, sampler: Sampler) -> Rule:
    """The specification: the best score given the draft tokens before the node."""
    return lambda node, drafts: int(sampler.scores(logits[node], drafts).argmax())


def argmax_of_all(logits: Tensor) -> Rule:
    """The same for a plain request, with one pass over all nodes."""
    best: list[int] = logits.argmax(-1).tolist()
    return lambda node, drafts: best[node]
