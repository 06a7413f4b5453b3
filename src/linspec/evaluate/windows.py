"""Windows of documents: the last tokens of each are scored, every token of a document once.

What predicts the next token and what fills masks are measured on the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from linspec.errors import ConfigError, InputError
from linspec.models.config import DecoderConfig
from linspec.train.data import end_of_text
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs and targets are neighbours in `ids`; the last `scored` targets count."""

    ids: Sequence[int]
    scored: int


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows of some documents, the longest first; tokens and bytes: how many are scored."""

    windows: list[Window]
    tokens: int
    bytes: int


def pick_context(config: DecoderConfig, context: int | None, *, least: int = 1) -> int:
    """`context`, by default that of the model; raises ConfigError where its positions do not suffice."""
    limit = config.position_limit
    context = config.max_positions if context is None else context
    check_size("context", context, least=least)
    if limit is not None and context > limit:
        raise ConfigError(f"context must be at most this model's {limit} positions, got {context}")
    return context


def cut(
    tokenizer: Any,
    config: DecoderConfig,
    documents: Iterable[str],
    *,
    context: int,
    stride: int,
    limit_bytes: int | None,
) -> Windows:
    """Windows of `context` targets that start `stride` apart; a document begins behind an end of text.

    limit_bytes takes documents in order and cuts the last one between characters. Raises InputError when
    there is nothing to score.
    """
    if limit_bytes is not None:
        check_size("limit_bytes", limit_bytes)
    texts = list(limited(documents, limit_bytes))
    first = end_of_text(tokenizer, config)
    encoded = _encode(tokenizer, texts)
    tokens, size = sum(map(len, encoded)), sum(len(text.encode()) for text in texts)
    if not tokens:
        raise InputError("there is no text to evaluate on; give a file that is not empty")
    windows = [w for ids in encoded if ids for w in _windows([first, *ids], context, stride)]
    # equal lengths side by side: little padding
    windows.sort(key=lambda window: len(window.ids), reverse=True)
    return Windows(windows, tokens, size)


def limited(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """Documents until `limit` bytes are reached."""
    left = math.inf if limit is None else limit
    for text in documents:
        if left <= 0:
            return
        content = text.encode()
        if len(content) > left:
            # a character that the cut goes through is left out
            text = content[: int(left)].decode("utf-8", errors="ignore")
        left -= len(content)
        yield text


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    try:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    # the tokenizers library raises bare Exception for what its file cannot encode
    except Exception as error:
        raise InputError(
            f"this tokenizer cannot encode the text: {error}; copy the tokenizer's files again"
        ) from error
    return found


def _windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Windows of a sequence; its first token is given, every other one is scored once."""
    done = 1
    for start in range(0, len(ids), stride):
        end = min(start + context + 1, len(ids))
        if end > done:
            yield Window(ids[start:end], end - done)
            done = end
