"""Verifying a layer of drafted beams: rejection sampling over pairs of a beam and its next token.

Beam sampling draws the beams of the next layer from the joint distribution of all pairs (beam, token). Here a
smaller model has drawn them from its own joint, and the target keeps some: each kept one is a draw from the
target's joint. How many a layer should keep is decided before any coin is thrown, by how many are likely.

Paper: dynamic-width speculative beam decoding, arXiv 2409.16560.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from linspec.decoding.sampling import Sampler
from linspec.verifiers.lossless import normalized, residual


def joint(weights: Sequence[float], rows: Tensor) -> Tensor:
    """The distribution [B, V] of pairs: a beam by its weight, then a token by its row [B, V]."""
    return normalized(rows * rows.new_tensor(weights)[:, None])


def accepted_law(p: Tensor, q: Tensor, drafts: int) -> list[float]:
    """The chances that 0, 1, …, `drafts` of so many draws from `q` are accepted for `p`, both over N pairs.

    q may sum to less than 1: the rest is draws behind beams that the target did not keep.
    """
    first, none_yet, rest = [], [1.0], p
    for _ in range(drafts):
        accept = min(1.0, float(rest.minimum(q).sum()))
        # the first acceptance comes with this draw; behind it everything begins again
        first.append(accept * none_yet[-1])
        none_yet.append((1 - accept) * none_yet[-1])
        rest = _left(rest, q, None)
    law = [[chance] for chance in none_yet]
    for count in range(1, drafts + 1):
        for tried in range(drafts + 1):
            ways = (first[k] * law[tried - k - 1][count - 1] for k in range(tried))
            law[tried].append(math.fsum(ways))
    return law[drafts]


def layer_width(law: Sequence[float], threshold: float, least: int) -> int:
    """How many beams a layer is to keep: the most that are kept with a chance of `threshold`.

    A threshold below 0 takes the mean number, rounded down. Never fewer than `least`.
    """
    if threshold < 0:
        mean = math.fsum(count * chance for count, chance in enumerate(law))
        return max(least, math.floor(mean))
    width = len(law) - 1
    while width > least and math.fsum(law[width:]) < threshold:
        width -= 1
    return max(width, least)


def judge_layer(
    p: Tensor,
    q: Tensor,
    drafts: Sequence[int | None],
    width: int,
    most: int,
    sampler: Sampler,
) -> tuple[list[int], bool]:
    """Draws from `p` [N], taken from `drafts` as far as these go; and whether the layer is kept.

    A layer is kept if `width` drafts are accepted: these are the draws. Otherwise one draw of what is left of
    p makes up for the last rejection, and fresh draws fill up to `most`.

    The first `width` draws are independent draws from p, over both ends of the layer together. Given that
    the layer was kept they are not: kept ones lean to where q is large, and a layer that was not kept has
    `most` draws instead of `width`.

    Args:
        p: the target's joint of the beams that it holds, over N pairs.
        q: that of the smaller model for the same pairs; sums to at most 1.
        drafts: draws from the whole joint of the smaller model, in order: numbers of pairs, None for a pair
            whose beam the target does not hold.
        width: accepted drafts that keep the layer, fixed before this is called.
        most: draws of a layer that is not kept; width or more.
        sampler: of the request.
    """
    found: list[int] = []
    rest = p
    for draft in drafts:
        if len(found) == width:
            break
        if draft is not None and sampler.uniform() * float(q[draft]) < float(rest[draft]):
            found.append(draft)
            rest = p
        else:
            rest = _left(rest, q, draft)
    if len(found) == width:
        return found, True
    found.append(sampler.draw(rest))
    return [*found, *(sampler.draw(p) for _ in range(most - len(found)))], False


def _left(p: Tensor, q: Tensor, rejected: int | None) -> Tensor:
    """norm(max(p - q, 0)): what the next draw has to come from after a rejection."""
    if rejected is not None:
        return residual(p, q, rejected)
    rest = (p - q).clamp_(min=0)
    # all of p lies under q: no draft is ever rejected, up to rounding
    return normalized(rest) if rest.any() else p
