"""Text between two tokenizers: what tokens say, and how another tokenizer spells it from some place on.

said = Said(tokenizer, hidden)          # text of a growing list of tokens, in whole characters
said.read(tokens)
spelled(backend, said.text[:n], "and so on")      # the tokens of the second text behind the first
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from linspec.errors import DrafterError

# what tokenizers print for a character whose bytes are not all there yet
PARTIAL = "\ufffd"
# tokens after which bytes that became no character are taken as they are
_PATIENCE = 64
# characters before a border that a tokenizer sees: more than most tokens have
_CONTEXT = 32
# in whose place a text is spelled if its own end would grow into what follows
_NEUTRAL = ("\n", ".", " ", "0")


@dataclass(frozen=True, slots=True)
class Spelling:
    """Tokens, and for each the characters up to its end; whole: whether a character ends there too."""

    tokens: list[int]
    ends: list[int]
    whole: list[bool]

    def behind(self, marks: list[int]) -> Spelling:
        """This behind tokens that say nothing."""
        nothing, whole = [0] * len(marks), [True] * len(marks)
        return Spelling([*marks, *self.tokens], [*nothing, *self.ends], [*whole, *self.whole])

    def cut(self, most: int) -> int:
        """The largest number of first tokens, `most` or less, that end where a character ends."""
        return next((n for n in range(most, 0, -1) if self.whole[n - 1]), 0)


def backend_of(tokenizer: Any, whose: str) -> Tokenizer:
    """The tokenizer of the library `tokenizers` inside; raises DrafterError where there is none."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        raise DrafterError(
            f"the tokenizer of {whose} is a {type(tokenizer).__name__} that does not say where its tokens "
            "lie in a text; drafts between two tokenizers need one with a tokenizer.json"
        )
    return found


def special_tokens(backend: Tokenizer) -> dict[int, str]:
    """Its special tokens by their ids."""
    added = backend.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}


def spelled(backend: Tokenizer, before: str, text: str) -> Spelling:
    """The tokens of `text` where it follows `before`.

    A tokenizer that would join the two is asked what it makes of `text` behind something neutral: the tokens
    before are decided, whatever they should have been.
    """
    for context in (before[-_CONTEXT:], *_NEUTRAL):
        found = _behind(backend, context, text)
        if found is not None:
            return found
    return Spelling([], [], [])


def _behind(backend: Tokenizer, context: str, text: str) -> Spelling | None:
    border = len(context)
    encoding = backend.encode(context + text, add_special_tokens=False)
    places = list(zip(encoding.ids, encoding.offsets, strict=True))
    if any(begin < border < end for _, (begin, end) in places):
        return None
    # a token of nothing, such as a space in front, belongs to what follows it
    mine = [(token, place) for token, place in places if place[1] > border]
    ends = [end for _, (_, end) in mine]
    # where the next one begins
    begins = [*(begin for _, (begin, _) in mine), border + len(text)][1:]
    return Spelling(
        [token for token, _ in mine],
        [end - border for end in ends],
        [begin >= end for begin, end in zip(begins, ends, strict=True)],
    )


class Said:
    """The text of a growing list of tokens.

    hidden: tokens that are left out of it. `whole`: whether the tokens so far end where a character ends.
    """

    def __init__(self, tokenizer: Any, hidden: Collection[int] = ()) -> None:
        self.text = ""
        self._tokenizer, self._hidden = tokenizer, hidden
        self._read = 0
        # tokens whose text is the end of `text`, and those behind them
        self._context: list[int] = []
        self._pending: list[int] = []

    @property
    def whole(self) -> bool:
        """Whether all tokens that were read are in the text."""
        return not self._pending

    def read(self, tokens: Sequence[int]) -> None:
        """Read on in `tokens`, which begin with those that were read."""
        new = [token for token in tokens[self._read :] if token not in self._hidden]
        self._read = len(tokens)
        self._pending += new
        if not self._pending:
            return
        more = addition(self._tokenizer, self._context, self._pending)
        if more.endswith(PARTIAL) and len(self._pending) < _PATIENCE:
            return
        self.text += more
        if more:
            self._context = self._pending
        self._pending = []


def addition(tokenizer: Any, context: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add behind `context`."""
    before: str = tokenizer.decode(list(context), skip_special_tokens=False) if context else ""
    text: str = tokenizer.decode([*context, *tokens], skip_special_tokens=False)
    if not text.startswith(before):
        text, before = tokenizer.decode(list(tokens), skip_special_tokens=False), ""
    return text[len(before) :]
