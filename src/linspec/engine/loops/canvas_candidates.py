"""The tokens that a round of masked diffusion could decide, by the rules and the numbers of a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linspec.decoding.likeliest import likeliest_token
from linspec.decoding.sampling import Sampler
from linspec.decoding.sequence import RunningSequence
from linspec.diffusion import Candidates, Canvas, Predictions


def candidates_of(
    canvas: Canvas,
    sequence: RunningSequence,
    sampler: Sampler,
    predictions: Predictions,
    positions: Sequence[int],
    given: Sequence[int] | None = None,
) -> Candidates:
    """A token for each position, with the clean logits: temperature changes no confidence.

    given: the tokens; None takes what the forward proposes.
    """
    logits = predictions.logits(positions)
    if given is not None:
        tokens = torch.tensor(given)
    elif sampler.plain:
        tokens = logits.argmax(-1)
    else:
        begun, pairs = len(sequence.tokens), zip(positions, logits, strict=True)
        tokens = torch.tensor(
            [token_of(sampler, canvas.tokens[begun:at], scores) for at, scores in pairs]
        )
    at, uniforms = torch.tensor(positions), uniforms_of(sampler)
    return Candidates(at, tokens, logits, uniforms, canvas, predictions)


def uniforms_of(sampler: Sampler) -> Callable[[int], Tensor]:
    """So many numbers of the request's own."""
    return lambda count: torch.tensor(
        [sampler.uniform() for _ in range(count)], dtype=torch.float64
    )


def token_of(sampler: Sampler, before: Sequence[int], logits: Tensor) -> int:
    """A token behind those `before` it by the rules of the request, drawn by one number.

    The published samplers take the argmax of the logits and T times Gumbel noise: the same distribution,
    softmax(logits / T), for a number a token of the vocabulary.
    """
    if sampler.greedy:
        return likeliest_token(sampler.scores(logits, before))
    return sampler.draw(sampler.probabilities(logits, before))
