"""Drafts of coming canvases: which are made after a round, and which of them the next forward confirms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

from linspec.diffusion import Candidates, Canvas, VerifyPolicy
from linspec.engine.loops.canvas_candidates import candidates_of, uniforms_of
from linspec.engine.loops.canvas_forward import Denoising
from linspec.errors import ConfigError


def followed(verify: VerifyPolicy, denoising: Denoising, drafts: Sequence[Canvas]) -> int:
    """How many drafts further the forward says what comes next; the canvas becomes that draft."""
    canvas = denoising.canvas
    if not drafts or canvas.full or len(drafts[0]) != len(canvas):
        return 0
    more = verify.follows(canvas, drafts)
    if type(more) is not int or not 0 <= more <= len(drafts):
        raise ConfigError(
            f"diffusion verify policy {verify.name!r} answered {more!r}; it goes on with one of "
            f"{len(drafts)} drafts, from 1 on, or with none, 0"
        )
    if more and drafts[more - 1].tokens != canvas.tokens:
        denoising.canvas = drafts[more - 1]
    return more


def drafted(
    verify: VerifyPolicy,
    denoising: Denoising,
    candidates: Candidates | None,
    chosen: Callable[[Candidates], Tensor],
    rows: Callable[[Canvas], int],
) -> tuple[list[Canvas], list[float]]:
    """What the canvas will be after the next rounds of its block, if forwards go on to say the same.

    With them, how likely the last forward found all that each has. candidates: of the last round. chosen:
    which of some a round decides. rows: how many the next forward computes of a canvas.
    """
    canvas, found, sures = denoising.canvas, list[Canvas](), list[float]()
    if candidates is None or canvas.full:
        return found, sures
    count = _count(verify, canvas)
    if count == 0:
        return found, sures
    each = rows(canvas)
    if not verify.tries([_most_sure(denoising, candidates)], each):
        return found, sures
    sequence = denoising.sequence
    # drafts draw the numbers that their rounds will draw, from a copy that many of them never need
    ahead = cache(sequence.sampler.ahead)
    while len(found) < count:
        if sequence.sampler.greedy:
            candidates = candidates.still_open(
                canvas, lambda numbers: uniforms_of(ahead())(numbers)
            )
        else:
            said = candidates.predictions
            candidates = candidates_of(canvas, sequence, ahead(), said, said.among(canvas.open))
        taken = chosen(candidates)
        canvas = canvas.after(candidates.where(taken))
        sure = (sures[-1] if sures else 1.0) * float(candidates.confidence[taken].prod())
        if canvas.full or not verify.tries([*sures, sure], each):
            break
        found.append(canvas)
        sures.append(sure)
    return found, sures


def _most_sure(denoising: Denoising, candidates: Candidates) -> float:
    """A bound on how sure any draft is, which costs less than a draft."""
    left, sampler = denoising.canvas.undecided, denoising.sequence.sampler
    # what is drawn is no likelier than the likeliest token
    each = candidates.confidence if sampler.greedy else candidates.probabilities.amax(-1)
    pairs = zip(candidates.positions.tolist(), each.tolist(), strict=True)
    return max((sure for position, sure in pairs if position in left), default=0.0)


def _count(verify: VerifyPolicy, canvas: Canvas) -> int:
    count = verify.ahead(canvas)
    if type(count) is not int or count < 0:
        raise ConfigError(
            f"diffusion verify policy {verify.name!r} answered {count!r}; a canvas has 0 drafts or more"
        )
    return count
