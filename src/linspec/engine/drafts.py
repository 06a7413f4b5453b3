"""What became of the drafts of a round, for those who show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from linspec.decoding.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Rejected:
    """A branch of drafts that was not accepted.

    behind: how many accepted drafts of the same round stand before it.
    """

    behind: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drafts:
    """What a piece owes to drafts.

    Attributes:
        drafted: how many of its tokens were accepted drafts: the first ones.
        drafter: the name of who drafted in this round; '' if nobody did.
        rejected: the branches that were not accepted, those that stand first in the text first.
        parts: its text in parts, each with the name of its drafter; '' for text of the model itself. The
            text may belong to tokens of earlier pieces.
    """

    drafted: int
    drafter: str
    rejected: tuple[Rejected, ...]
    parts: tuple[tuple[str, str], ...]


def rejected(outcome: Outcome) -> tuple[Rejected, ...]:
    """The branches of a judged tree that were not accepted."""
    tree, accepted = outcome.tree, outcome.accepted
    if tree is None or accepted is None:
        return ()
    kept = set(accepted.path)
    leaves = [node for node in range(len(tree)) if not tree.children[node] and node not in kept]
    branches = [[n for n in tree.path_to(leaf) if n not in kept] for leaf in leaves]
    found = [
        Rejected(tree.depths[branch[0]] - 1, tuple(tree.tokens[n] for n in branch))
        for branch in branches
    ]
    return tuple(sorted(found, key=lambda each: each.behind))


class DraftedText:
    """Who wrote which part of a text, as the text grows and is shown."""

    def __init__(self) -> None:
        # where parts end, with their authors; the last ones are not shown yet
        self._ends: list[tuple[int, str]] = []
        self._shown = 0

    def grew(self, length: int, author: str) -> None:
        """The text is `length` long now, and what is new is by `author`; a stop string makes it shorter."""
        while self._ends and self._ends[-1][0] > length:
            author = self._ends.pop()[1]
        if self._ends and self._ends[-1][1] == author:
            self._ends.pop()
        if length > (self._ends[-1][0] if self._ends else self._shown):
            self._ends.append((length, author))

    def show(self, text: str) -> tuple[tuple[str, str], ...]:
        """`text`, which follows what was shown before, in parts."""
        return tuple(self._cut(text))

    def _cut(self, text: str) -> Iterator[tuple[str, str]]:
        while text:
            # text that no token brought: the bytes of an incomplete last character
            end, author = self._ends[0] if self._ends else (self._shown + len(text), "")
            part, text = text[: end - self._shown], text[end - self._shown :]
            self._shown += len(part)
            if self._ends and self._shown == end:
                self._ends.pop(0)
            yield part, author
