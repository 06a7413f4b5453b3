"""Block verification: judge a chain of sampled drafts as a whole, by the ratio of joint probabilities.

Rejection sampling stops at the first draft that it rejects. Here a draft that is too likely at one place
is paid for by those beside it: the deepest draft whose prefix the target can stand for is kept, so the mean
number of accepted drafts is never smaller, and the output has the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from linspec.decoding.accepted import Accepted
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import DrafterError
from linspec.verifiers.base import VERIFIERS, check_logits, conclude
from linspec.verifiers.lossless import LosslessVerifier, normalized, on_cpu


@VERIFIERS.register(
    "block",
    summary="judges a chain of sampled drafts as a whole: exact, and accepts at least what 'lossless' does",
    paper="Sun et al. 2024, arXiv 2403.10444",
    lossless="yes",
)
class BlockVerifier:
    """Exact at every temperature; the rule of the paper for chains whose tokens were sampled.

    Everything else is judged as the verifier 'lossless' does it, which is exact there too:

    - temperature 0: the greedy rule, because the joint probability of a path is then 0 or 1;
    - chains without proposals: all of a proposal would be on its one token, for which both rules accept
      equally many, and the rule of 'lossless' gives the tokens that the same seed gives without drafts;
    - trees: the rule is about one path, and a choice between paths would change the distribution.

    In a chain that has proposals for some nodes only, the others are certain drafts: all of their proposal is
    on the token.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    divides: ClassVar[bool] = True
    matches: ClassVar[Literal["", "greedy", "all"]] = "all"

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """The longest prefix of the chain that its joint probabilities allow, and a token of the rest."""
        sampled = any(tree.children[node] for node in tree.proposals if node < len(tree))
        if sampler.greedy or not sampled or not tree.shape.is_chain:
            return LosslessVerifier().accept(tree, logits, sampler)
        check_logits(tree, logits)
        drafts = tree.tokens[1:]
        p = [
            normalized(on_cpu(sampler.probabilities(row, drafts[:depth])))
            for depth, row in enumerate(logits)
        ]
        q = [_proposal(tree, node, p[node]) for node in range(len(drafts))]
        shares, chances = block_law(p, q, drafts)
        kept = len(drafts)
        while kept and not sampler.uniform() < chances[kept - 1]:
            kept -= 1
        rest = p[kept] if kept == len(drafts) else left_over(shares[kept], p[kept], q[kept])
        # p and q are equal up to rounding: the rest has no probability worth modelling
        token = sampler.draw(rest if rest.any() else p[kept])
        return conclude(tree, logits, sampler, tuple(range(kept + 1)), token)


def _proposal(tree: TokenTree, node: int, target: Tensor) -> Tensor:
    """The distribution [V] that the child of `node` was sampled from; a point mass for a certain draft."""
    token, given = tree.tokens[node + 1], tree.proposals.get(node)
    if given is None:
        return _certain(token, target)
    if given.shape != target.shape:
        raise DrafterError(
            f"proposals of node {node} must be a distribution over the target's vocabulary "
            f"{list(target.shape)}, got {list(given.shape)}"
        )
    proposal = normalized(on_cpu(given))
    # a token that the proposal cannot have given is a certain draft
    return proposal if proposal[token] > 0 else _certain(token, target)


def _certain(token: int, target: Tensor) -> Tensor:
    return torch.zeros_like(target).index_fill(0, torch.tensor(token), 1.0)


def block_law(
    p: Sequence[Tensor], q: Sequence[Tensor], drafts: Sequence[int]
) -> tuple[list[float], list[float]]:
    """What the rule says of a chain of N drafts: the share of each prefix, the chance of each to be kept.

    p: the target's distribution [V] behind each of the N + 1 nodes; q: those that the drafts were sampled
    from. shares[i] is how much of the first i drafts the target can stand for (1 for none of them);
    chances[i - 1] is the chance of keeping i of them, once it is decided that no longer prefix is kept.
    """
    shares = [1.0]
    for row, proposal, token in zip(p, q, drafts, strict=False):
        shares.append(min(1.0, shares[-1] * float(row[token]) / float(proposal[token])))
    chances = []
    for share, row, proposal in zip(shares[1:-1], p[1:], q[1:], strict=False):
        rest = float(left_over(share, row, proposal).sum())
        chances.append(1.0 if share >= 1 else rest / (rest + 1 - share))
    return shares, [*chances, shares[-1]]


def left_over(share: float, p: Tensor, q: Tensor) -> Tensor:
    """max(share · p - q, 0) [V]: what longer prefixes leave of the target, not normalized."""
    return (share * p - q).clamp_(min=0)
