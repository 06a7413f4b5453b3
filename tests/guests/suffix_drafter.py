"""A guest: drafts what followed the longest known suffix, in this request or in an earlier one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from linspec import DRAFTERS, ChainDrafter, DrafterContext, RunningSequence, option

DRAFTED = 16


@dataclass(frozen=True)
class SuffixOptions:
    """How far back a match reaches, and how much is remembered."""

    max_length: int = option("tokens of the longest suffix that is looked for", default=4)
    memory: int = option("suffixes that are remembered", default=100_000)

    def __post_init__(self) -> None:
        if min(self.max_length, self.memory) < 1:
            raise ValueError("max_length and memory must be 1 or more; leave them out")


@DRAFTERS.register(
    "guest-suffix",
    summary="copies what followed the same suffix in this request or an earlier one",
    paper="Oliaro et al. 2024 (SuffixDecoding), arXiv 2411.04975",
    needs="nothing",
    options=SuffixOptions,
)
class SuffixDrafter(ChainDrafter):
    """Suffixes of one length and below lead to what came next when they were last seen."""

    def __init__(self, context: DrafterContext, options: SuffixOptions) -> None:
        super().__init__(context, options)
        self.options = options
        self.followers: OrderedDict[tuple[int, ...], tuple[int, ...]] = OrderedDict()
        self.known: dict[int, int] = {}

    def started(self, row: RunningSequence) -> None:
        self.known[row.number] = 0

    def draft(self, rows: Sequence[RunningSequence], budgets: Sequence[int]) -> list[list[int]]:
        for row in rows:
            self._remember(row, len(row.tokens) - DRAFTED)
        return [
            list(self._continuation(row.tokens)[:budget])
            for row, budget in zip(rows, budgets, strict=True)
        ]

    def finished(self, row: RunningSequence) -> None:
        self._remember(row, len(row.tokens))
        self.known.pop(row.number, None)

    def _continuation(self, tokens: Sequence[int]) -> tuple[int, ...]:
        for length in range(self.options.max_length, 0, -1):
            found = self.followers.get(tuple(tokens[-length:]))
            if found is not None:
                return found
        return ()

    def _remember(self, row: RunningSequence, until: int) -> None:
        """Enter the suffixes that end before `until`; asked twice, it has nothing left to do."""
        for end in range(max(1, self.known.get(row.number, 0)), until):
            follower = tuple(row.tokens[end : end + DRAFTED])
            for length in range(1, min(self.options.max_length, end) + 1):
                self.followers[tuple(row.tokens[end - length : end])] = follower
        self.known[row.number] = max(until, self.known.get(row.number, 0))
        while len(self.followers) > self.options.memory:
            self.followers.popitem(last=False)
