"""Lossless verification: any draft, and the output still has the target's distribution.

Certain drafts need no rejection: drawing one token of the target and descending iff a child carries
it is exact. It also spends one uniform per emitted token, as plain decoding does, so equal seeds give
equal outputs with and without a drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from linspec.decoding.accepted import Accepted
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import DrafterError
from linspec.verifiers.base import VERIFIERS, walk
from linspec.verifiers.greedy import GreedyVerifier


@VERIFIERS.register(
    "lossless",
    summary="rejection sampling over the tree; the greedy rule at temperature 0",
    paper="Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318; "
    "SpecInfer, Miao et al. 2023, arXiv 2305.09781",
    lossless="yes",
)
class LosslessVerifier:
    """Exact at every temperature.

    The children of a node with a proposal distribution must be all its draws without replacement, in
    the order drawn. A drafter that drops a draw because of its token makes the output inexact.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    divides: ClassVar[bool] = True
    matches: ClassVar[Literal["", "greedy", "all"]] = "all"

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """Sample the target along the tree, helped by the proposals where there are any."""
        if sampler.greedy:
            return GreedyVerifier().accept(tree, logits, sampler)
        return walk(tree, logits, sampler, partial(sample_token, tree, logits, sampler))


def sample_token(
    tree: TokenTree, logits: Tensor, sampler: Sampler, node: int, drafts: tuple[int, ...]
) -> int:
    """A token of the target's distribution after `node`, if possible one that a child carries."""
    target = sampler.probabilities(logits[node], drafts)
    proposal = tree.proposals.get(node)
    if proposal is None:
        return sampler.draw(target)
    if proposal.shape != target.shape:
        raise DrafterError(
            f"proposals of node {node} must be a distribution over the target's vocabulary "
            f"{list(target.shape)}, got {list(proposal.shape)}"
        )
    candidates = [tree.tokens[child] for child in tree.children[node]]
    return sample_with_candidates(target, proposal, candidates, sampler)


def sample_with_candidates(
    target: Tensor, proposal: Tensor, candidates: Sequence[int], sampler: Sampler
) -> int:
    """A token of `target` [V], given draws without replacement from `proposal` [V].

    Each candidate x is kept with probability min(1, p(x) / q(x)); a rejection leaves the target with
    the residual max(p - q, 0) and the proposal without x. No rejected candidate can be drawn
    afterwards: its residual is 0.
    """
    p, q = normalized(on_cpu(target)), normalized(on_cpu(proposal))
    for token in candidates:
        # a candidate that q cannot have produced is a deterministic draft: all of q is on it
        chance = float(q[token]) or 1.0
        if sampler.uniform() * chance < float(p[token]):
            return token
        p = residual(p, q, token) if q[token] > 0 else normalized(without(p, token))
        q = normalized(without(q, token))
    return sampler.draw(p)


def residual(p: Tensor, q: Tensor, rejected: int) -> Tensor:
    """norm(max(p - q, 0)) [V]."""
    rest = (p - q).clamp_(min=0)
    if not rest.any():
        # p and q are equal up to rounding, so this rejection had no probability worth modelling
        rest = without(p, rejected)
    return normalized(rest)


def without(weights: Tensor, token: int) -> Tensor:
    """A copy of `weights` [V] with 0 for `token`."""
    weights = weights.clone()
    weights[token] = 0
    return weights


def normalized(weights: Tensor) -> Tensor:
    """`weights` [V] summing to 1, or unchanged if there is nothing to normalize."""
    total = weights.sum()
    return weights / total if total > 0 else weights


def on_cpu(probabilities: Tensor) -> Tensor:
    # float64: differences of nearly equal float32 probabilities are mostly rounding
    return probabilities.to("cpu", torch.float64)
