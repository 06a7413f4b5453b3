"""What the tokens of a shard take over from the shards before it, as each mixer says.

Some entries are read one by one (a span of groups, a window, all of them). Older ones have become a
*summary*, whose size does not depend on their number; summaries of neighbouring shards join without the
entries: the algebra of LASP-2 (Sun et al. 2025, arXiv 2502.07563).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch


class Older(Protocol):
    """What becomes of entries that are not read one by one any more."""

    def summary(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Whole groups of entries by themselves, k [B, Hkv, T, K'] and v [B, Hkv, T, V']: [B, Hkv, S, .]."""
        ...

    def joined(self, sums: torch.Tensor | None, summary: torch.Tensor, tokens: int) -> torch.Tensor:
        """`sums` as `mix` takes them after the `tokens` entries of a summary; None before the first."""
        ...


@dataclass(frozen=True, slots=True)
class Carry:
    """A token reads the last `span` groups of entries one by one, its own group included.

    span: None for all entries. older: what the others become; None forgets them.
    """

    group: int = 1
    span: int | None = 1
    older: Older | None = None

    def first_read(self, position: int) -> int:
        """The first position that a token at `position` may read by itself; groups begin there."""
        if self.span is None:
            return 0
        return max(0, (position // self.group - (self.span - 1)) * self.group)


@dataclass(frozen=True, slots=True)
class Cut:
    """A shard start..end in pieces, by positions: its entries up to `head` and from `tail` on are handed on.

    head..closed: whole groups, of which later shards need the summary alone.
    """

    start: int
    head: int
    closed: int
    tail: int
    end: int

    @property
    def rows(self) -> int:
        """How many entries are handed on one by one."""
        return self.head - self.start + self.end - self.tail


def cut(carry: Carry, lengths: Sequence[int], history: int) -> list[Cut]:
    """The pieces of shards of these lengths; `history` values before a shard are read by a convolution."""
    borders = accumulate(lengths, initial=0)
    return [_cut(carry, start, end, history) for start, end in pairwise(borders)]


def _cut(carry: Carry, start: int, end: int, history: int) -> Cut:
    closed, head = carry.first_read(end), start
    if carry.older is not None:
        # entries of a group that began in an earlier shard: who has all of it closes it
        head = min(end, -(-start // carry.group) * carry.group)
    if closed <= head:
        return Cut(start, start, start, start, end)
    return Cut(start, head, closed, max(head, min(closed, end - history)), end)
