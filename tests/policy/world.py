"""A virtual machine room: requests, drafters and machines made of numbers; policies are judged in seconds.

    python tests/policy/world.py [WORD …]     # a line for each cell whose name has the words

Time is a number that rounds add to; nothing is measured. A policy *sees* noisy seconds (cold first rounds,
jitter, hiccups, a core that others take and give back) and is *charged* the quiet ones, its own cost
included, so that policies can be compared without repeats. What a text holds is fixed by its seed: every
policy decodes the same one.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Any
from zlib import crc32

from linspec.decoding.tree import NO_DRAFTS, Budget, TokenTree, best_first, chain
from linspec.drafters.base import ChainDrafter, Drafter
from linspec.policies.base import Policy, RoundTimes
from linspec.policies.costs import CostCurve
from linspec.policies.fixed import Fixed
from linspec.policies.goodput import Goodput
from linspec.policies.planner import CANDIDATES

# what a policy costs: in every round and for each of its requests, and where it chooses anew (measured, Auto)
_PLAN, _PLAN_EACH, _CHOOSE, _CHOOSE_EACH = 2.3e-6, 0.5e-6, 14e-6, 21e-6


def curve(*milliseconds: float) -> CostCurve:
    """Of 1, 2, 4, … 64 nodes."""
    return CostCurve({2**i: ms / 1e3 for i, ms in enumerate(milliseconds)})


# recorded: an EPYC with AVX-512, two threads; 1.1B by its ratios in docs/results/cpu.md
CURVES = {
    "135m": curve(2.883, 3.032, 3.332, 3.779, 6.393, 9.704, 18.581),
    "135m-int8": curve(2.469, 2.470, 3.195, 4.215, 6.106, 11.459, 23.235),
    "5m": curve(0.226, 0.226, 0.275, 0.448, 0.556, 1.033, 2.058),
    "1b-int8": curve(24.0, 24.3, 25.0, 25.9, 27.6, 38.0, 62.0),
}
# at high load every node costs as much as the one before
LINEAR = CostCurve({1: 0.5e-3, 64: 0.5e-3 * 64})


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


# rounds that a policy may take to learn a machine and a drafter
WARM_UP = 150

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

    name = "lookup"

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

    name = "model"

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

    name = "confident"
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


@dataclass(frozen=True)
class Cell:
    """A workload on a machine."""

    machine: str = "135m"
    drafter: str = "lookup"
    text: str = "code"
    batch: int = 1
    context: int = 128
    busy: bool = False
    stale: bool = False
    answer: int = 64
    requests: int = 24

    @property
    def name(self) -> str:
        words = (
            self.machine,
            self.drafter,
            self.text,
            f"batch{self.batch}",
            f"context{self.context}",
        )
        return " ".join(
            (*words, *("busy",) * self.busy, *("stale",) * self.stale, f"answer{self.answer}")
        )

    @property
    def curve(self) -> CostCurve:
        """Of the machine when nobody disturbs it."""
        return LINEAR if self.machine == "linear" else CURVES[self.machine]

    def make_drafter(self) -> Any:
        text = TEXTS[self.text]
        kinds = {"lookup": Lookup, "model": Model, "confident": Confident}
        return Trees(text) if self.drafter == "heads" else kinds[self.drafter]()

    def known(self) -> CostCurve:
        """The curve that a policy is given: right, or measured while others used the machine."""
        true = self.curve.seconds
        if not self.stale:
            return CostCurve(true)
        rng = random.Random(crc32(self.name.encode()))
        return CostCurve({n: s * rng.choice([1.0, 1.2, 1.6, 1.9]) for n, s in true.items()})

    # ---- seconds, when nobody disturbs

    def step(self, counts: Sequence[int]) -> float:
        """A step with so many draft nodes of each sequence."""
        cache = 0.1e-6 * self.context * self.curve(1) / 2.5e-3
        packed = len(counts) + sum(counts)
        seconds = self.curve(min(packed, 64)) * max(1.0, packed / 64)
        return seconds + cache * sum(1 + 0.1 * count for count in counts)

    def rest(self, counts: Sequence[int]) -> float:
        return 60e-6 + 15e-6 * len(counts) + 2e-6 * sum(counts)

    def drafting(self, counts: Sequence[int]) -> float:
        most, one = max(counts, default=0), self.curve(1)
        if not most:
            return 0.0
        if self.drafter == "lookup":
            return 6e-6 + 4e-6 * sum(count > 0 for count in counts)
        return 0.12 * one * most if self.drafter == "model" else 0.14 * one

    def plain(self) -> float:
        """Tokens per second without drafts, and without anything that plans."""
        none = [0] * self.batch
        return self.batch / (self.step(none) + self.rest(none))


@dataclass
class Disturbance:
    """By how much a round seems longer than it is."""

    busy: bool
    rng: random.Random
    rounds: int = 0
    until: float = 0.0
    shared: bool = False

    def factor(self, now: float, round_seconds: float) -> float:
        self.rounds += 1
        cold = 1 + 0.4 * math.exp(-self.rounds / 10)
        found = cold * self.rng.lognormvariate(0.0, 0.03)
        if self.rng.random() < (0.03 if self.busy else 0.005):
            found *= self.rng.uniform(1.5, 8.0)
        if self.busy and now >= self.until:
            # from some rounds to some hundred
            self.shared = not self.shared
            self.until = now + round_seconds * self.rng.expovariate(1 / 80)
        return found * (1.8 if self.shared else 1.0)


@dataclass
class Found:
    """What a policy made of a cell."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    attempts: int = 0
    plans: list[list[int]] = field(default_factory=list)
    cold: tuple[int, float] = (0, 0.0)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def warm(self) -> float:
        """The rate without the first rounds."""
        return (self.tokens - self.cold[0]) / (self.seconds - self.cold[1])


def run(cell: Cell, policy: Policy, seed: int = 0, *, free: bool = False) -> Found:
    """Answer the requests of a cell; free: the policy costs nothing."""
    drafter, found, now = cell.make_drafter(), Found(), 0.0
    noise = Disturbance(cell.busy, random.Random(crc32(cell.name.encode()) + seed))
    text, begun, choices = TEXTS[cell.text], 0, 0
    running: list[Story] = []
    while True:
        for slot in sorted({*range(cell.batch)} - {row.slot for row in running}):
            if begun < cell.requests * cell.batch:
                story = Story(text, seed * 100_003 + begun, cell.answer)
                story.slot, begun = slot, begun + 1
                running.append(story)
        if not running or len(running) < cell.batch:
            return found
        budgets = policy.plan(running, drafter)
        trees = _proposed(running, budgets, drafter, policy)
        counts = [len(tree) - 1 for tree in trees]
        for row, tree in zip(running, trees, strict=True):
            path = drafter.path(row, tree)
            if len(tree) > 1:
                policy.observe(row, len(tree) - 1, len(path) - 1, drafter.score(row, tree))
                drafter.observe(row, tree, path)
            row.place += len(path)
            row.remaining -= len(path)
            found.tokens += len(path)
        asked = [budget.nodes for budget in budgets]
        parts = cell.drafting(asked), cell.step(counts), cell.rest(counts)
        quiet = sum(parts)
        factor = noise.factor(now, quiet)
        now += quiet * factor
        draft, step, rest = (part * factor for part in parts)
        policy.observe_round(RoundTimes(draft, step, sum(counts) + len(counts), max(counts), rest))
        found.seconds += quiet
        if not free:
            chose, choices = getattr(policy, "choices", 0) - choices, getattr(policy, "choices", 0)
            found.seconds += _PLAN + _PLAN_EACH * cell.batch
            found.seconds += chose * (_CHOOSE + _CHOOSE_EACH * cell.batch)
        found.rounds += 1
        if found.rounds == WARM_UP:
            found.cold = found.tokens, found.seconds
        found.drafted += sum(counts)
        found.attempts += any(counts)
        found.plans.append(asked)
        for row in [row for row in running if row.remaining <= 0]:
            policy.release(row.slot)
            running.remove(row)


def _proposed(
    rows: Sequence[Any], budgets: Sequence[Budget], drafter: Drafter, policy: Policy
) -> list[TokenTree]:
    """As the engine asks: within the room of each request, and only those with a budget."""
    room = [
        b.within(drafter.max_nodes, r.remaining - 1) for r, b in zip(rows, budgets, strict=True)
    ]
    asked = [i for i, budget in enumerate(room) if budget.nodes]
    trees = [chain((0,)) for _ in rows]
    if asked:
        made = drafter.propose([rows[i] for i in asked], [room[i] for i in asked])
        for i, tree in zip(asked, made, strict=True):
            kept = 1 + policy.keep(rows[i], tree) if len(tree) > 1 else 1
            trees[i] = tree if kept >= len(tree) else tree.first(kept)
    return trees


class Oracle(Policy):
    """Knows what rounds cost and how likely each draft of each request is right, but no draw."""

    name = "oracle"

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def plan(self, sequences: Sequence[Any], drafter: Any) -> list[Budget]:
        most = min(32, drafter.max_nodes)
        gains = [drafter.gains(row, most) for row in sequences]
        best, chosen = 0.0, [0] * len(sequences)
        for size in (0, *(n for n in CANDIDATES if n <= most)):
            ranked = sorted(range(len(gains)), key=lambda i: -gains[i][size])
            counts, tokens = [0] * len(gains), float(len(gains))
            for i in ranked if size else ranked[:1]:
                counts[i] = size
                tokens += gains[i][size]
                cell = self.cell
                seconds = cell.step(counts) + cell.rest(counts) + cell.drafting(counts)
                if tokens / seconds > best:
                    best, chosen = tokens / seconds, list(counts)
        return [Budget.of(n) if n else NO_DRAFTS for n in chosen]


@dataclass(frozen=True)
class Verdict:
    """How many times plain: the policy; the best fixed size and which it is; the oracle."""

    cell: Cell
    policy: float
    fixed: float
    size: int
    oracle: float

    @property
    def of_best(self) -> float:
        """Of the best fixed choice, plain decoding included."""
        return self.policy / max(1.0, self.fixed)

    def __str__(self) -> str:
        return (
            f"{self.cell.name}: {self.policy:.3f}, fixed:{self.size} {self.fixed:.3f}, "
            f"oracle {self.oracle:.3f}, of the best {self.of_best:.3f}"
        )


SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def best_fixed(cell: Cell, seed: int = 0) -> tuple[float, int]:
    return max((run(cell, Fixed(n), seed, free=True).rate / cell.plain(), n) for n in SIZES)


def judge(
    cell: Cell, make: Callable[[Cell], Policy] = lambda cell: Goodput(cell.known()), seed: int = 0
) -> Verdict:
    """A policy in a cell, beside what else could have been chosen."""
    fixed, size = best_fixed(cell, seed)
    oracle = run(cell, Oracle(cell), seed, free=True).rate / cell.plain()
    return Verdict(cell, run(cell, make(cell), seed).rate / cell.plain(), fixed, size, oracle)


def grid() -> list[Cell]:
    """Every machine, drafter, text, batch, context, quiet and busy."""
    axes = (CURVES, ("lookup", "heads", "model"), TEXTS, (1, 4, 16), (128, 8192), (False, True))
    return [
        Cell(m, d, t, b, c, busy, requests=max(2, 24 // b))
        for m, d, t, b, c, busy in product(*axes)
    ]


if __name__ == "__main__":
    for each in grid():
        if all(word in each.name for word in sys.argv[1:]):
            print(judge(each), flush=True)
