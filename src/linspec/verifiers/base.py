"""What every verifier returns and the walk that the exact ones share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor

from linspec.decoding.accepted import Accepted, path_tokens, token_logprob
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import InputError, NotFinite
from linspec.utils.registry import Registry


class Verifier(Protocol):
    """The rule that turns a tree and the target's logits into a path and one bonus token.

    lossless: whether the output has exactly the target's distribution.

    divides: whether the rule divides by the distribution that drafts were sampled from
    (`TokenTree.proposals`), as rejection sampling does. Such a rule is exact only if it sees every draw: a
    policy that drops one because of its token, or of the drafter's confidence in it, changes which drafts are
    judged, and with that the output. A rule that samples from the target and follows the draft that matches
    is exact for any tree, and so for any part of one. Hence what a policy may do:

    - before drafting: any budget, that is any number of nodes and any depth, with every verifier;
    - after drafting (`Policy.keep`): verify the first nodes of a tree alone, unless the verifier divides
      and the tree has proposals. The engine does not ask then.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    divides: ClassVar[bool]

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """Judge `tree` by `logits` [N, V]; the sampler's history ends with the tree's root."""
        ...


VERIFIERS: Registry[Verifier] = Registry("verifier", "linspec.verifiers")


def may_cut(verifier: Verifier, tree: TokenTree) -> bool:
    """Whether a part of `tree` may be verified in its place: see `Verifier`."""
    # a rule that does not say what it does may divide
    return not tree.proposals or not getattr(verifier, "divides", True)


Rule = Callable[[int, tuple[int, ...]], int]
"""(node, draft tokens on the path to it) -> the token that follows the node."""


def walk(tree: TokenTree, logits: Tensor, sampler: Sampler, rule: Rule) -> Accepted:
    """Go down from the root while a child carries the token that `rule` decides on."""
    check_logits(tree, logits)
    path = [0]
    while True:
        token = rule(path[-1], path_tokens(tree, path))
        child = child_with(tree, path[-1], token)
        if child is None:
            return conclude(tree, logits, sampler, tuple(path), token)
        path.append(child)


def conclude(
    tree: TokenTree, logits: Tensor, sampler: Sampler, path: tuple[int, ...], token: int
) -> Accepted:
    """The accepted path and bonus token, with log-probabilities if the request asks for them."""
    top = sampler.params.logprobs
    if top is None:
        return Accepted(path, token, None)
    rows = logits[list(path)].float().log_softmax(-1)
    emitted = (*path_tokens(tree, path), token)
    entries = (token_logprob(row, t, top) for row, t in zip(rows, emitted, strict=True))
    return Accepted(path, token, tuple(entries))


def child_with(tree: TokenTree, node: int, token: int) -> int | None:
    """The first child of `node` that carries `token`."""
    return next((c for c in tree.children[node] if tree.tokens[c] == token), None)


def check_logits(tree: TokenTree, logits: Tensor) -> None:
    """Raise InputError unless there is a row of logits for each node, NotFinite for NaN in one."""
    if logits.ndim != 2 or logits.shape[0] != len(tree):
        raise InputError(
            f"verifying a tree of {len(tree)} nodes needs logits [{len(tree)}, vocab], "
            f"got {list(logits.shape)}"
        )
    # the largest of a row is not finite where any is NaN or infinite, and where all are -infinity
    if not all(map(math.isfinite, logits.amax(-1).tolist())):
        raise NotFinite("the scores of the next token")
