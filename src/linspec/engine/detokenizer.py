"""Tokens to text as they arrive: whole characters only, and stop strings across token borders.

The rule is that of `tokenizers.decoders.DecodeStream`: decode what was shown last together with what
is new, and show the difference once it ends in a whole character. The class itself is not used: it
raises where a model writes bytes that are no character, shows the prompt again where that ends
inside one, and needs a tokenizer of its own library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# what tokenizers print for a character whose bytes are not all there yet
_PARTIAL = "\ufffd"
# tokens after which bytes that became no character are shown as they are
_PATIENCE = 64
# a few tokens of context keep the spaces that some tokenizers drop at the start of a text
_CONTEXT = 4
# tokens of an incomplete last character, and of what looks like one
_UNFINISHED = 16


class Detokenizer:
    """Turns one request's token stream into text, piece by piece.

    `push` takes one token; `full` is the text so far. A tail that could still become a stop string,
    or a character whose bytes are not complete, is held back until it is decided. A stop string may name
    special tokens, which are shown only with `special`.

    keep_stop: the text ends behind a stop string, not before it. min_tokens: stop strings that are complete
    by then end nothing.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop: Sequence[str],
        *,
        special: bool = False,
        keep_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.tokenizer, self._special = tokenizer, special
        self._left = min_tokens
        # tokens of which `_shown` is the text; they end where a character ends
        self._context, self._pending, self._shown = _context_of(self._decode, list(prompt))
        self.full = ""
        self._released = 0
        self._stops = _Stops(tokenizer, stop, special=special, keep=keep_stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; the text ends before it."""
        return self._stops.found

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=not self._special)
        return text

    def push(self, token: int) -> bool:
        """Add one token; True when a stop string is complete (the text then ends before it)."""
        self._pending.append(token)
        self._left -= 1
        text = self._decode([*self._context, *self._pending])
        undecided = text.endswith(_PARTIAL) or len(text) <= len(self._shown)
        new = "" if undecided and len(self._pending) < _PATIENCE else self._accept(text)
        return self._add(new, token)

    def _accept(self, text: str) -> str:
        """What `text` adds to what was shown; it becomes the context of what follows."""
        # a byte that belongs to no character spoils those before it
        grown = text.startswith(self._shown)
        new = text[len(self._shown) :] if grown else self._decode(self._pending)
        if new:
            self._context = self._pending
        self._pending = []
        self._shown = self._decode(self._context)
        return new

    def _add(self, new: str, token: int | None = None) -> bool:
        self.full += new
        end = self._stops.push(new, token, heeded=self._left < 0)
        if end is not None:
            self.full = self.full[:end]
        return self.stopped

    def finish(self) -> None:
        """No more tokens: an incomplete last character is shown as it is."""
        if self._pending:
            self._add(self._accept(self._decode([*self._context, *self._pending])))

    def release(self, last: bool = False) -> str:
        """Text that has become certain since the last call; everything when `last`."""
        end = len(self.full) if last else len(self.full) - self._stops.held()
        piece = self.full[self._released : end]
        self._released = max(self._released, end)
        return piece


def _context_of(decode: Any, prompt: list[int]) -> tuple[list[int], list[int], str]:
    """The end of a prompt, cut between characters: tokens, those of an incomplete character, text.

    Tokenizers that spell a character in bytes turn a whole run of bytes into replacement characters
    when it begins or ends inside a character, so a tail of fixed length would not do.
    """
    count = len(prompt)
    ends = range(count, max(count - _UNFINISHED, -1), -1)
    sizes = range(_CONTEXT, 4 * _CONTEXT)
    tails = [(end - size, end) for end in ends for size in sizes if size < end]
    for begin, end in [*tails, *((0, end) for end in ends)]:
        text = decode(prompt[begin:end])
        if not text.endswith(_PARTIAL) and (begin == 0 or text[:1] not in ("", _PARTIAL)):
            rest = decode(prompt[begin:])
            # a token can hold whole characters ahead of the beginning of one
            shown = rest.rstrip(_PARTIAL) if rest.startswith(text) else text
            return prompt[begin:end], prompt[end:], shown
    return prompt, [], decode(prompt)


class _Stops:
    """Looks for stop strings in the text as it is shown, and as it would be with its special tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], *, special: bool, keep: bool) -> None:
        self.stop, self.found = tuple(stop), False
        self._all_shown, self._keep = special, keep
        self._tokenizer = tokenizer
        self._shown = self._marked = ""
        # where special tokens stand in the marked text: begin and end of each
        self._hidden: list[tuple[int, int]] = []

    def push(self, new: str, token: int | None, *, heeded: bool = True) -> int | None:
        """Add shown text, and the token that came with it; where the shown text ends, if it does.

        Stop strings that are complete while they are not `heeded` count no more.
        """
        if not self.stop:
            return None
        before = len(self._shown), len(self._marked)
        self._shown += new
        self._marked += new
        self._mark("" if token is None else self._special(token))
        if not heeded:
            return None
        ends = [
            *self._matches(self._shown, before[0], []),
            *map(self._place, self._matches(self._marked, before[1], self._hidden)),
        ]
        self.found = bool(ends)
        return min(ends, default=None)

    def _mark(self, name: str) -> None:
        if name:
            self._hidden.append((len(self._marked), len(self._marked) + len(name)))
            self._marked += name

    def _special(self, token: int) -> str:
        """How a token is written that is not shown; '' for one that is."""
        if self._all_shown or self._tokenizer.decode([token], skip_special_tokens=True):
            return ""
        name: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return name

    def _matches(self, text: str, begin: int, hidden: list[tuple[int, int]]) -> Iterator[int]:
        """Where the text ends for stop strings that end behind `begin`.

        One matches with all or nothing of a special token.
        """
        for stop in self.stop:
            start = text.find(stop, max(0, begin - len(stop) + 1))
            while start >= 0:
                end = start + len(stop)
                if not any(a < start < b or a < end < b for a, b in hidden):
                    yield end if self._keep else start
                    break
                start = text.find(stop, start + 1)

    def _place(self, end: int) -> int:
        """Length of the shown text in the first `end` characters of the marked text."""
        return end - sum(max(0, min(last, end) - first) for first, last in self._hidden)

    def held(self) -> int:
        """How many of the last shown characters are the beginning of a stop string."""
        marked = len(self._marked) - self._tail(self._marked)
        return max(self._tail(self._shown), len(self._shown) - self._place(marked))

    def _tail(self, text: str) -> int:
        """Length of the longest tail that is the beginning of a stop string."""
        tails = (
            size
            for stop in self.stop
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )
        return max(tails, default=0)
