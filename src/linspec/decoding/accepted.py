"""What a verifier has decided about a tree, and the logprobs of the tokens that it emitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from linspec.decoding.tree import TokenTree


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model itself: temperature 1, no penalty, no bias.

    top: the likeliest tokens with their log-probabilities, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The part of a tree that a verifier keeps, and the token it adds.

    path: accepted nodes from the root (always node 0) down.
    token: the bonus token; it becomes the root of the next round.
    logprobs: one entry per emitted token, None when the request does not ask for them.
    """

    path: tuple[int, ...]
    token: int
    logprobs: tuple[TokenLogprob, ...] | None

    def emitted(self, tree: TokenTree) -> tuple[int, ...]:
        """The round's new tokens: the accepted drafts, then the bonus token."""
        return (*path_tokens(tree, self.path), self.token)


def token_logprob(row: Tensor, token: int, top: int) -> TokenLogprob:
    """The entry of `token` in a row [V] of log-probabilities, with its `top` best alternatives."""
    best = row.topk(min(top, row.shape[-1]))
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(row[token]), tuple(alternatives))


def path_tokens(tree: TokenTree, path: Sequence[int]) -> tuple[int, ...]:
    """Draft tokens on a path from the root; the root's own token is history already."""
    return tuple(tree.tokens[node] for node in path[1:])
