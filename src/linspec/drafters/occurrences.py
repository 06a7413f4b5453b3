"""Where n-grams occur in texts of tokens: the counts of a suffix tree, without the tree.

    texts = Occurrences(depth=64, votes=64)
    number = texts.open()
    texts.extend(number, [5, 6, 7, 5, 6])
    texts.matches([5, 6], 2)     # one place: 7 follows

A suffix tree of depth D keeps up to D nodes for each token. This keeps the ends of n-grams of three sizes and
compares backwards from there, so a token costs three entries, about 300 bytes, at any D. A text is removed
without a trace: what is counted is what occurs in the texts that are left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Sizes of the n-grams whose ends are kept. A long one finds the few places that matter in a large memory,
# where the newest ends of a short one are those of other texts.
SIZES = (8, 2, 1)
# an end is one number: that of its text, and the place in it
_SHIFT = 32
_PLACE = (1 << _SHIFT) - 1
# tokens that are compared at a time
_BLOCK = 8


class Match(NamedTuple):
    """The last `length` tokens of a context also stand before `end` in `text`, where something follows."""

    length: int
    text: list[int]
    end: int


class Occurrences:
    """Texts that grow at their ends, and the places of their n-grams.

    Args:
        depth: tokens of the longest match.
        votes: of an n-gram, the newest ends that are kept, two or more.
    """

    def __init__(self, depth: int, votes: int) -> None:
        self.depth, self.votes = depth, votes
        # tokens of all texts
        self.tokens = 0
        self._texts: dict[int, list[int]] = {}
        self._opened = 0
        self._ends: dict[int, dict[int, tuple[int, ...]]] = {size: {} for size in SIZES}

    def open(self) -> int:
        """The number of a new, empty text."""
        self._opened += 1
        self._texts[self._opened] = []
        return self._opened

    def text(self, number: int) -> list[int]:
        """The tokens of a text, which are not to be changed."""
        return self._texts[number]

    def extend(self, number: int, tokens: Iterable[int]) -> None:
        """Add tokens at the end of a text."""
        text = self._texts[number]
        before = len(text)
        for token in tokens:
            # an end is of use once something follows it
            place = number << _SHIFT | len(text)
            for size, ends in self._ends.items():
                if size <= len(text):
                    key = _key(text, size)
                    ends[key] = (*ends.get(key, ())[1 - self.votes :], place)
            text.append(token)
        self.tokens += len(text) - before

    def remove(self, number: int) -> None:
        """Forget a text."""
        text = self._texts.pop(number)
        self.tokens -= len(text)
        for size, ends in self._ends.items():
            for end in range(size, len(text)):
                key = _key(text[end - size : end], size)
                left = tuple(place for place in ends.get(key, ()) if place >> _SHIFT != number)
                if left:
                    ends[key] = left
                else:
                    ends.pop(key, None)

    def matches(self, context: list[int], size: int) -> list[Match]:
        """Places of the last `size` tokens of `context`, one of SIZES, newest first."""
        found, context = [], context[-self.depth :]
        for place in reversed(self._ends[size].get(_key(context, size), ())):
            text, end = self._texts[place >> _SHIFT], place & _PLACE
            length = _common(context, text, end)
            # keys are hashes, which may be those of other n-grams
            if length >= size:
                found.append(Match(length, text, end))
        return found


def _key(tokens: list[int], size: int) -> int:
    return hash(tuple(tokens[-size:]))


def _common(context: list[int], text: list[int], end: int) -> int:
    """How many of the last tokens of `context` stand before `end` in `text`."""
    last = len(context)
    most, length = min(last, end), 0
    if text[end - most : end] == context[last - most :]:
        return most
    while (
        length + _BLOCK <= most
        and context[last - length - _BLOCK : last - length]
        == text[end - length - _BLOCK : end - length]
    ):
        length += _BLOCK
    while context[last - length - 1] == text[end - length - 1]:
        length += 1
    return length
