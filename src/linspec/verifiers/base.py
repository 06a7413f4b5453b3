"""What every verifier returns and the walk that the exact ones share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from linspec.decoding.accepted import Accepted, path_tokens, token_logprob
from linspec.decoding.judged import JudgeBy
from linspec.decoding.likeliest import likeliest
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import TokenTree
from linspec.errors import InputError, NotFinite
from linspec.utils.registry import Registry


class Verifier(Protocol):
    """The rule that turns a tree and the target's logits into an accepted path and one bonus token.

    What a policy may do to a tree depends on the rule:

    - before drafting: any budget, that is any number of nodes and any depth, with every verifier;
    - after drafting (`Policy.keep`): verify only the first nodes of a tree, unless the verifier divides and
      the tree has proposals. The engine does not ask then.

    The reason: a rule that divides is exact only if it judges every draw. A policy that drops a draft
    because of its token, or because of the confidence of the drafter, changes the output. A rule that
    samples from the target and follows the draft that matches is exact for every tree, so also for a part
    of one.

    Paper: Leviathan et al. 2023, arXiv 2211.17192; for trees Miao et al. 2023, arXiv 2305.09781.

    Attributes:
        name: under which it is registered.
        lossless: whether the output has exactly the distribution of the target.
        divides: whether the rule divides by the distribution that drafts were sampled from
            (`TokenTree.proposals`), as rejection sampling does.
        matches: for which requests the rule follows the child that carries the target's own token, if the
            tree has no proposals: 'greedy' for those at temperature 0 (the likeliest token), 'all' for the
            others too (one drawn by the next number of the request). Then a step may judge in its place, see
            `judge_by`; '' for none, as of a rule that does not say it.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    divides: ClassVar[bool]
    matches: ClassVar[Literal["", "greedy", "all"]]

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """The accepted path and the bonus token.

        Args:
            tree: N nodes; node 0 is the root, which the sequence holds already.
            logits: [N, vocab], the scores of the target for the token after each node.
            sampler: random numbers and rules of the request; its history ends with the root.

        Raises:
            InputError: the logits do not fit the tree.
            NotFinite: a score is NaN.
        """
        ...


VERIFIERS: Registry[Verifier] = Registry("verifier", "linspec.verifiers")
"""The registry of verifiers. Packages add to it by entry points of the group `linspec.verifiers`."""


def may_cut(verifier: Verifier, tree: TokenTree) -> bool:
    """Whether a part of `tree` may be verified in its place: see `Verifier`."""
    # a rule that does not say what it does may divide
    return not tree.proposals or not getattr(verifier, "divides", True)


def judge_by(verifier: Verifier, tree: TokenTree, sampler: Sampler) -> JudgeBy | None:
    """How a step may judge `tree` in the place of its verifier; None where the host has to see scores.

    It has to for whatever changes scores by the history (penalties, bias, bans, grammars, processors), for
    top-k, top-p and min-p, and for log-probabilities.
    """
    matches = getattr(verifier, "matches", "")
    if not matches or not sampler.unchanged or sampler.params.logprobs is not None:
        return None
    if sampler.greedy:
        return JudgeBy(regrow=tree.regrow)
    if matches != "all" or tree.proposals:
        return None
    return JudgeBy(sampler.params.temperature, sampler.coming, tree.regrow)


Rule = Callable[[int, tuple[int, ...]], int]
"""(node, draft tokens on the path to it) -> the token that follows the node."""


def walk(tree: TokenTree, logits: Tensor, sampler: Sampler, rule: Rule) -> Accepted:
    """Go down from the root while a child carries the token that `rule` decides on."""
    check_logits(tree, logits)
    return descend(tree, logits, sampler, rule)


def descend(tree: TokenTree, logits: Tensor, sampler: Sampler, rule: Rule) -> Accepted:
    """As `walk`, of logits that are checked."""
    path = [0]
    while True:
        try:
            token = rule(path[-1], path_tokens(tree, path))
        except InputError:
            if len(path) == 1:
                raise
            # nothing may follow this draft: the round that begins with it says so, as without drafts
            return conclude(tree, logits, sampler, tuple(path[:-1]), tree.tokens[path[-1]])
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


def check_logits(tree: TokenTree, logits: Tensor) -> list[int]:
    """The likeliest token behind each node, once its logits are known to be sound.

    Raises InputError unless there is a row of logits for each node, NotFinite for NaN in one.
    """
    if logits.ndim != 2 or logits.shape[0] != len(tree):
        raise InputError(
            f"verifying a tree of {len(tree)} nodes needs logits [{len(tree)}, vocab], "
            f"got {list(logits.shape)}"
        )
    return check_finite(logits)


def check_finite(logits: Tensor) -> list[int]:
    """The likeliest token of each row [N, V]; raises NotFinite for NaN or infinity in one.

    Single tokens may be banned, at minus infinity.
    """
    tokens, scores = likeliest(logits)
    # the largest of a row is not finite where any is NaN or infinite, and where all are -infinity
    if not all(map(math.isfinite, scores)):
        raise NotFinite("the scores of the next token")
    return tokens
