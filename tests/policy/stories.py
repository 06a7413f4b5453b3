"""Texts and drafters made of numbers: what is right is drawn place by place, alike for every policy."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from linspec.decoding.tree import Budget, TokenTree, best_first, chain
from linspec.drafters.base import ChainDrafter, Drafter


@dataclass(frozen=True)
class Text:
    """What the texts of a workload are like.

    copied: share of the tokens in passages that come again, and their mean length. match: how often
    something is found to copy from elsewhere; right: how often that is right. heads: how often trained
    guesses are right, by depth; each request is better or worse by up to `spread` (of the odds).
    """

    copied: float = 0.0
    passage: float = 20.0
    match: float = 0.1
    right: float = 0.05
    heads: tuple[float, ...] = (0.5, 0.35, 0.3)
    spread: float = 0.3


TEXTS = {
    "repetitive": Text(0.85, 60.0, 0.5, 0.5, (0.85, 0.8, 0.75, 0.7)),
    "code": Text(0.4, 15.0, 0.3, 0.35, (0.7, 0.55, 0.45, 0.4)),
    "summary": Text(0.2, 8.0, 0.2, 0.3, (0.52, 0.37, 0.31)),
    "conversation": Text(0.06, 5.0, 0.2, 0.25, (0.45, 0.3, 0.2)),
    "random": Text(0.0, 1.0, 0.1, 0.02, (0.05, 0.02, 0.01)),
    "mixed": Text(0.4, 20.0, 0.2, 0.2, (0.5, 0.35, 0.3), spread=2.0),
}


class Story:
    """One request: what is right at each of its places. Drawn place by place, the same for every policy."""

    def __init__(self, text: Text, seed: int, length: int) -> None:
        self.text, self.slot, self.root, self.remaining = text, 0, 0, length
        self._rng = random.Random(seed)
        self._odds = math.exp(self._rng.uniform(-text.spread, text.spread))
        self._copying, self.place = False, 0
        self._places: list[tuple[float, bool, float, float]] = []
        self._tokens: list[int] = []

    @property
    def tokens(self) -> list[int]:
        """What was decoded: 0 where a copy is right, as copies are zeros."""
        while len(self._tokens) < self.place:
            luck, _, right, _ = self.at(len(self._tokens))
            self._tokens.append(0 if luck < right else 1)
        return self._tokens

    def at(self, place: int) -> tuple[float, bool, float, float]:
        """A number in 0…1 that decides; whether a match is found, and likely right; how clear the text is."""
        while len(self._places) <= place:
            self._places.append(self._next())
        return self._places[place]

    def _next(self) -> tuple[float, bool, float, float]:
        rng, text = self._rng, self.text
        leave = 1 / text.passage
        enter = leave * text.copied / max(1e-9, 1 - text.copied)
        self._copying = rng.random() < (1 - leave if self._copying else enter)
        found = self._copying or rng.random() < text.match
        clear = math.exp(rng.gauss(0.0, 1.0))
        return rng.random(), found, 0.97 if self._copying else text.right, clear

    def rate(self, depth: int, rank: int) -> float:
        """How often the guess of this rank is right at this depth, from 0."""
        rates = self.text.heads
        first = rates[min(depth, len(rates) - 1)]
        first = tilted(first, self._odds)
        return first if rank == 0 else first * (1 - first) * 0.5**rank


def tilted(rate: float, odds: float) -> float:
    return rate * odds / (1 - rate + rate * odds)


class Lookup(ChainDrafter):
    """Copies; finds nothing in many rounds."""

    name, confident, model_free = "lookup", True, True

    def draft(self, rows: Sequence[Any], lengths: Sequence[int]) -> list[list[int]]:
        return [
            [0] * n if row.at(row.place)[1] else [] for row, n in zip(rows, lengths, strict=True)
        ]

    def path(self, row: Story, tree: TokenTree) -> list[int]:
        depth = 0
        while depth < len(tree) - 1:
            luck, _, right, _ = row.at(row.place + depth)
            if luck >= right:
                break
            depth += 1
        return list(range(depth + 1))

    def gains(self, row: Story, most: int) -> list[float]:
        """Accepted drafts to expect from 0, 1, … nodes; what the oracle knows."""
        if not row.at(row.place)[1]:
            return [0.0] * (most + 1)
        rights = (row.at(row.place + depth)[2] for depth in range(most))
        return [0.0, *accumulate(accumulate(rights, lambda a, b: a * b))]


class Model(Lookup):
    """A small model: a chain whose every depth costs a step of its own."""

    name, confident, model_free = "model", False, False

    def draft(self, rows: Sequence[Any], lengths: Sequence[int]) -> list[list[int]]:
        return [[0] * n for n in lengths]

    def path(self, row: Story, tree: TokenTree) -> list[int]:
        depth = 0
        while depth < len(tree) - 1 and row.at(row.place + depth)[0] < row.rate(0, 0):
            depth += 1
        return list(range(depth + 1))

    def gains(self, row: Story, most: int) -> list[float]:
        return [0.0, *accumulate(row.rate(0, 0) ** (depth + 1) for depth in range(most))]


class Confident(Lookup):
    """A block of drafts in one pass, with a confidence for each: informative, and too sure of itself."""

    name, confident, model_free = "confident", True, False
    max_nodes = 16

    def right(self, row: Story, depth: int) -> float:
        """How likely the draft at this depth is right: some places of a text are clearer than others."""
        return tilted(row.rate(0, 0), row.at(row.place + depth)[3] ** 2)

    def propose(self, rows: Sequence[Any], budgets: Sequence[Budget]) -> list[TokenTree]:
        trees = []
        for row, budget in zip(rows, budgets, strict=True):
            shape = chain((0,) * (budget.chain + 1))
            rights = (self.right(row, depth) for depth in range(budget.chain))
            sure = (1.0, *(tilted(right, 1.6 * (right / (1 - right)) ** 0.5) for right in rights))
            trees.append(replace(shape, confidences=sure))
        return trees

    def path(self, row: Story, tree: TokenTree) -> list[int]:
        depth = 0
        while depth < len(tree) - 1 and row.at(row.place + depth)[0] < self.right(row, depth):
            depth += 1
        return list(range(depth + 1))

    def gains(self, row: Story, most: int) -> list[float]:
        rights = (self.right(row, depth) for depth in range(most))
        return [0.0, *accumulate(accumulate(rights, lambda a, b: a * b))]


class Trees(Drafter):
    """Calibrated heads: a tree of rank paths, whose gains on other data it knows."""

    name = "heads"

    def __init__(self, text: Text) -> None:
        super().__init__()
        typical = Story(replace(text, spread=0.0), 0, 1)
        depths = len(text.heads)
        rates = [[typical.rate(depth, rank) for rank in range(5)] for depth in range(depths)]
        self._paths = best_first(rates, 63)
        self.max_nodes = len(self._paths)
        index = {path: node for node, path in enumerate(self._paths, 1)} | {(): 0}
        self._parents = (-1, *(index[path[:-1]] for path in self._paths))
        self._gains = self._sums(typical)

    def _sums(self, row: Story) -> list[float]:
        reach = (math.prod(row.rate(d, r) for d, r in enumerate(path)) for path in self._paths)
        return [0.0, *accumulate(reach)]

    def propose(self, rows: Sequence[Any], budgets: Sequence[Budget]) -> list[TokenTree]:
        return [
            TokenTree((0,) * (budget.nodes + 1), self._parents[: budget.nodes + 1])
            for budget in budgets
        ]

    def expected(self, budget: Budget) -> float:
        return self._gains[min(budget.nodes, self.max_nodes)]

    def path(self, row: Story, tree: TokenTree) -> list[int]:
        path = [0]
        while True:
            luck, below = row.at(row.place + len(path) - 1)[0], 0.0
            for child in tree.children[path[-1]]:
                below += row.rate(len(path) - 1, self._paths[child - 1][-1])
                if luck < below:
                    path.append(child)
                    break
            else:
                return path

    def gains(self, row: Story, most: int) -> list[float]:
        return self._sums(row)[: most + 1]
