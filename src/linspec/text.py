"""Tokens to text as they arrive: whole characters only, and stop strings across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# what byte-level tokenizers print for a character whose bytes are not all there yet
_PARTIAL = "\ufffd"


class Detokenizer:
    """Turns one request's token stream into text, piece by piece.

    `push` takes one token; `text` is what may be shown so far. A tail that could still become a
    stop string, or a character whose bytes are not complete, is held back until it is decided.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        # a few tokens of context keep the spaces that some tokenizers drop at the start of a text
        self._window = list(prompt[-4:])
        self._shown = self._decode(self._window)
        self.full = ""
        self._released = 0
        self.stopped = False

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def push(self, token: int) -> bool:
        """Add one token; True when a stop string is complete (the text then ends before it)."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_PARTIAL) and len(self._window) < 16:
            return False
        begin = len(self.full)
        self.full += text[len(self._shown) :]
        self._window = self._window[-4:]
        self._shown = self._decode(self._window)
        return self._cut_at_stop(begin)

    def _cut_at_stop(self, begin: int) -> bool:
        found = [
            at
            for stop in self.stop
            if (at := self.full.find(stop, max(0, begin - len(stop) + 1))) >= 0
        ]
        if found:
            self.full, self.stopped = self.full[: min(found)], True
        return self.stopped

    def finish(self) -> None:
        """No more tokens: an incomplete last character is shown as it is."""
        text, begin = self._decode(self._window), len(self.full)
        self.full += text[len(self._shown) :]
        self._shown = text
        self._cut_at_stop(begin)

    def release(self, last: bool = False) -> str:
        """Text that has become certain since the last call; everything when `last`."""
        end = len(self.full) if last else len(self.full) - self._undecided()
        piece = self.full[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _undecided(self) -> int:
        """Length of the longest tail that is the beginning of a stop string."""
        tails = (
            size
            for stop in self.stop
            for size in range(min(len(stop) - 1, len(self.full)), 0, -1)
            if self.full.endswith(stop[:size])
        )
        return max(tails, default=0)
