"""Parts of answers that several endpoints share: usage, log-probabilities, ids."""

from __future__ import annotations

import uuid
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from linspec.decoding.accepted import TokenLogprob
from linspec.decoding.request import Request
from linspec.engine.results import Generation, Piece
from linspec.serve.schemas.base import CachedTokens, Speculation, StreamOptions, Usage
from linspec.serve.shown import shown_drafts
from linspec.serve.token_bytes import TokenBytes

# what stands for a token that cannot come, which JSON has no number for
_NEVER = -9999.0


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return prefix + uuid.uuid4().hex


def in_order(ended: Sequence[Mapping[int, Generation]]) -> list[list[Generation]]:
    """The outputs of each request by the numbers of their sequences, in whichever order they ended."""
    return [[each for _, each in sorted(outputs.items())] for outputs in ended]


def usage_of(outputs: Sequence[Sequence[Generation]]) -> Usage:
    """Tokens of all outputs, with each prompt once: that of its first sequence."""
    every = [each for group in outputs for each in group]
    prompt = sum(group[0].prompt_tokens for group in outputs if group)
    completion = sum(len(each.token_ids) for each in every)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=cached_tokens(outputs)),
        linspec=speculation_of(every),
    )


class RunningUsage:
    """What the chunks of a stream have as `usage`, beside the last one, which has the usage of all."""

    def __init__(self, options: StreamOptions | None, prompts: Sequence[Request]) -> None:
        self._continuous = options is not None and options.continuous_usage_stats
        self._last = options is not None and options.include_usage
        self._prompt = sum(len(each.prompt) for each in prompts)
        self._tokens: Counter[tuple[int, int]] = Counter()

    def take(self, piece: Piece) -> dict[str, Any]:
        """The field of the chunks of a piece, where its caller asked for it."""
        place = piece.index, piece.sequence
        self._tokens[place] += len(piece.token_ids)
        if piece.done is not None:
            # a stop text may have taken some back
            self._tokens[place] = len(piece.done.token_ids)
        if self._continuous:
            completion = self._tokens.total()
            return {
                "usage": {
                    "prompt_tokens": self._prompt,
                    "completion_tokens": completion,
                    "total_tokens": self._prompt + completion,
                }
            }
        return {"usage": None} if self._last else {}


def cached_tokens(outputs: Sequence[Sequence[Generation]]) -> int:
    """Prompt tokens that came from the prefix cache."""
    return sum(group[0].cached_tokens for group in outputs if group)


def speculation_of(outputs: Iterable[Generation]) -> Speculation:
    """What drafts brought to some outputs."""
    stats = [each.stats for each in outputs]
    rounds, accepted = sum(s.rounds for s in stats), sum(s.accepted for s in stats)
    return Speculation(
        tokens_per_round=1.0 + accepted / rounds if rounds else 1.0,
        rounds=rounds,
        drafted=sum(s.drafted for s in stats),
        accepted=accepted,
    )


def drafts_of(piece: Piece, tokenizer: Any) -> dict[str, Any]:
    """What a choice says of drafts, where its caller asked for it."""
    return {} if piece.drafts is None else {"linspec": shown_drafts(piece, tokenizer)}


def chat_logprobs(words: TokenBytes, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As chat answers have them."""
    return {"content": [_chat_token(words, each) for each in found], "refusal": None}


def _chat_token(words: TokenBytes, entry: TokenLogprob) -> dict[str, Any]:
    top = [_spelled(words, token, logprob) for token, logprob in entry.top]
    return {**_spelled(words, entry.token, entry.logprob), "top_logprobs": top}


def _spelled(words: TokenBytes, token: int, logprob: float) -> dict[str, Any]:
    found = words.read(token)
    return {
        "token": found.decode("utf-8", "replace"),
        "logprob": max(logprob, _NEVER),
        "bytes": list(found),
    }


class TextLogprobs:
    """As answers of /v1/completions have them; offsets count on from piece to piece, in characters.

    special: whether the text shows special tokens.
    """

    def __init__(self, words: TokenBytes, *, special: bool = False) -> None:
        self._words, self._special = words, special
        self._offset = 0
        # a character begins with its first token
        self._characters = getincrementaldecoder("utf-8")("replace")

    def take(
        self,
        found: Sequence[TokenLogprob | None],
        tokens: Sequence[int],
        text: str | None = None,
    ) -> dict[str, Any]:
        """The entries of some tokens, of which the first of a prompt has none.

        text: all of it, up to the last of these tokens, where it is known; no offset runs past its end.
        """
        return {
            "tokens": [self._words.name(token) for token in tokens],
            "token_logprobs": [each and max(each.logprob, _NEVER) for each in found],
            "top_logprobs": [each and self._top(each) for each in found],
            "text_offset": [self._begin_of(token, text) for token in tokens],
        }

    def _begin_of(self, token: int, text: str | None) -> int:
        """Where a token begins; the next one begins behind it."""
        begin = self._offset if text is None else min(self._offset, len(text))
        new = self._characters.decode(self._words.read(token))
        if token not in self._words.special or self._shows(new, text):
            self._offset = begin + len(new)
        return begin

    def _shows(self, special: str, text: str | None) -> bool:
        """Whether a special token stands in the text at this place."""
        return self._special if text is None else text.startswith(special, self._offset)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        # two tokens may be written the same; the likelier one comes first
        found: dict[str, float] = {}
        for token, logprob in ((entry.token, entry.logprob), *entry.top):
            found.setdefault(self._words.name(token), max(logprob, _NEVER))
        return found
