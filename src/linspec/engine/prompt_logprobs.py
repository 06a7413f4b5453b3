"""How likely a model finds the tokens of a prompt, piece by piece as it is read."""

from __future__ import annotations

from torch import Tensor

from linspec.decoding.accepted import token_logprob
from linspec.decoding.sequence import Row
from linspec.errors import ConfigError


def refuse_source(row: Row) -> None:
    """Raise ConfigError where a row whose prompt is a source asks how likely that is."""
    if row.params.prompt_logprobs is not None:
        raise ConfigError(
            "prompt_logprobs are those of a prompt that the output goes on from; this model reads its "
            "prompt as a source, so leave them out"
        )


def score_prompt(row: Row, logits: Tensor) -> None:
    """Enter the tokens that the next piece's logits [N, V] tell about; nothing tells about the first.

    The logits of a piece tell about its tokens from the second on, and about the first of the next piece.
    """
    top = row.params.prompt_logprobs
    assert top is not None, "this request does not ask for it"
    if row.prefilled == 0:
        row.prompt_logprobs.append(None)
    begin = row.prefilled + 1
    told = row.tokens[begin : min(begin + len(logits), row.prompt_length)]
    for scores, token in zip(logits, told, strict=False):
        row.prompt_logprobs.append(token_logprob(scores.float().log_softmax(-1), token, top))
