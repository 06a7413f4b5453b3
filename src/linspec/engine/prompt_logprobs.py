"""How likely a model finds the tokens of a prompt, piece by piece as it is read."""

from __future__ import annotations

from torch import Tensor

from linspec.decoding.accepted import token_logprob
from linspec.decoding.sequence import RunningSequence
from linspec.errors import ConfigError


def refuse_source(sequence: RunningSequence) -> None:
    """Raise ConfigError where a sequence whose prompt is a source asks how likely that is."""
    if sequence.params.prompt_logprobs is not None:
        raise ConfigError(
            "prompt_logprobs are those of a prompt that the output goes on from; this model reads its "
            "prompt as a source, so leave them out"
        )


def score_prompt(sequence: RunningSequence, logits: Tensor) -> None:
    """Enter the tokens that the next piece's logits [N, V] tell about; nothing tells about the first.

    The logits of a piece tell about its tokens from the second on, and about the first of the next piece.
    """
    top = sequence.params.prompt_logprobs
    assert top is not None, "this request does not ask for it"
    if sequence.prefilled == 0:
        sequence.prompt_logprobs.append(None)
    begin = sequence.prefilled + 1
    told = sequence.tokens[begin : min(begin + len(logits), sequence.prompt_length)]
    for scores, token in zip(logits, told, strict=False):
        sequence.prompt_logprobs.append(token_logprob(scores.float().log_softmax(-1), token, top))
