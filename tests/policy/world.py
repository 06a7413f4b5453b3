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
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from zlib import crc32

from stories import TEXTS, Confident, Lookup, Model, Story, Trees

from linspec.decoding.tree import NO_DRAFTS, Budget, TokenTree, chain
from linspec.drafters.base import Drafter
from linspec.policies.auto import Auto
from linspec.policies.base import Policy, RoundTimes
from linspec.policies.costs import CostCurve
from linspec.policies.fixed import Fixed
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


# rounds that a policy may take to learn a machine and a drafter
WARM_UP = 150


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

    @property
    def reading(self) -> float:
        """Seconds that a token of the cache adds to a plain step."""
        return 0.1e-6 * self.curve(1) / 2.5e-3

    def make_drafter(self) -> Any:
        text = TEXTS[self.text]
        kinds = {"lookup": Lookup, "model": Model, "confident": Confident}
        return Trees(text) if self.drafter == "heads" else kinds[self.drafter]()

    def known(self) -> CostCurve:
        """The curve that a policy is given: right, or measured while others used the machine."""
        true = self.curve.seconds
        if not self.stale:
            return CostCurve(true, 3 * self.reading)
        rng = random.Random(crc32(self.name.encode()))
        stale = {n: s * rng.choice([1.0, 1.2, 1.6, 1.9]) for n, s in true.items()}
        return CostCurve(stale, 3 * self.reading)

    # ---- seconds, when nobody disturbs

    def step(self, counts: Sequence[int]) -> float:
        """A step with so many draft nodes of each sequence."""
        cache = self.context * self.reading
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
    room = Room(cell, policy, seed, free=free)
    found, begun = room.found, 0
    while True:
        for slot in sorted({*range(cell.batch)} - {row.slot for row in room.running}):
            if begun < cell.requests * cell.batch:
                room.begin(seed * 100_003 + begun, slot)
                begun += 1
        if not room.running or len(room.running) < cell.batch:
            return found
        room.round()
        if found.rounds == WARM_UP:
            found.cold = found.tokens, found.seconds


class Room:
    """A machine, a drafter and a policy, and the requests that run: one round after the other."""

    def __init__(self, cell: Cell, policy: Policy, seed: int, *, free: bool = False) -> None:
        self.cell, self.policy, self.free = cell, policy, free
        self.drafter, self.found = cell.make_drafter(), Found()
        self.running: list[Any] = []
        self._noise = Disturbance(cell.busy, random.Random(crc32(cell.name.encode()) + seed))
        # what a clock shows, disturbances included; times that the policy chose anew
        self._seen, self._choices = 0.0, 0

    def begin(self, seed: int, slot: int) -> Story:
        """A request has a slot."""
        story = Story(TEXTS[self.cell.text], seed, self.cell.answer)
        story.slot = slot
        self.running.append(story)
        return story

    def round(self) -> list[Story]:
        """One round of all that run; those that are finished."""
        found, running = self.found, self.running
        budgets = self.policy.plan(running, self.drafter)
        trees = _proposed(running, budgets, self.drafter, self.policy)
        for row, tree in zip(running, trees, strict=True):
            self._judge(row, tree)
        counts, asked = [len(tree) - 1 for tree in trees], [budget.nodes for budget in budgets]
        found.seconds += self._seconds(asked, counts)
        found.rounds += 1
        found.drafted += sum(counts)
        found.attempts += any(counts)
        found.plans.append(asked)
        finished = [row for row in running if row.remaining <= 0]
        for row in finished:
            self.policy.release(row.slot)
            running.remove(row)
        return finished

    def _judge(self, row: Story, tree: TokenTree) -> None:
        path, drafter = self.drafter.path(row, tree), self.drafter
        if len(tree) > 1:
            self.policy.observe(row, len(tree) - 1, len(path) - 1, drafter.score(row, tree))
            drafter.observe(row, tree, path)
        row.place += len(path)
        row.remaining -= len(path)
        self.found.tokens += len(path)

    def _seconds(self, asked: Sequence[int], counts: Sequence[int]) -> float:
        """What a round is charged; the policy sees more of them."""
        cell, policy = self.cell, self.policy
        parts = cell.drafting(asked), cell.step(counts), cell.rest(counts)
        quiet = sum(parts)
        factor = self._noise.factor(self._seen, quiet)
        self._seen += quiet * factor
        draft, step, rest = (part * factor for part in parts)
        nodes, cached = sum(counts) + len(counts), len(counts) * cell.context
        policy.observe_round(RoundTimes(draft, step, nodes, max(counts), rest, cached))
        if self.free:
            return quiet
        before, self._choices = self._choices, getattr(policy, "choices", 0)
        chose, rows = self._choices - before, len(counts)
        return quiet + _PLAN + _PLAN_EACH * rows + chose * (_CHOOSE + _CHOOSE_EACH * rows)


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
    cell: Cell, make: Callable[[Cell], Policy] = lambda cell: Auto(cell.known()), seed: int = 0
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
