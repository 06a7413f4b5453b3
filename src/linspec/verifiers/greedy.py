"""Greedy verification: the output is the target's own greedy decode, token for token."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from linspec.decoding.accepted import Accepted
from linspec.decoding.likeliest import likeliest_token
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError
from linspec.verifiers.base import VERIFIERS, Rule, check_logits, descend, walk


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
    matches: ClassVar[Literal["", "greedy", "all"]] = "greedy"

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """Descend while a child carries the argmax of its parent's scores."""
        if not sampler.greedy:
            raise ConfigError(
                f"the greedy verifier cannot sample at temperature {sampler.params.temperature}. "
                "Use the verifier 'lossless', or temperature 0."
            )
        if not sampler.plain:
            return walk(tree, logits, sampler, argmax_of_scores(logits, sampler))
        # the same with one pass over all nodes, which checks them too
        best = check_logits(tree, logits)
        return descend(tree, logits, sampler, lambda node, drafts: best[node])


def argmax_of_scores(logits: Tensor, sampler: Sampler) -> Rule:
    """The specification: the best score given the draft tokens before the node."""
    return lambda node, drafts: likeliest_token(sampler.scores(logits[node], drafts))
