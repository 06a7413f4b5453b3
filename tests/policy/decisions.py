"""Made-up machines, drafters and requests, and what the automatic policy decides about them.

    python tests/policy/decisions.py     # writes decisions.json again: only when decisions should change

Everything is drawn from the seed of a scenario: the curve of costs, what drafting and committing cost, how
often a draft is right at each depth, and when requests come and go.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.drafters.base import ChainDrafter, Drafter
from linspec.policies.base import RoundTimes
from linspec.policies.costs import CostCurve
from linspec.policies.goodput import Goodput

FILE = Path(__file__).with_name("decisions.json")
SCENARIOS, ROUNDS = 28, 240
RATES = (0.0, 0.3, 0.7, 0.95, 0.99)


class Chain(ChainDrafter):
    """A chain drafter that learns how often each depth is right."""

    name = "test-chain"


class Table(Drafter):
    """A drafter of trees whose gains are known beforehand, as those of calibrated heads."""

    name = "test-table"

    def __init__(self, gains: Sequence[float]) -> None:
        self.gains = [0.0, *accumulate(gains)]
        self.max_nodes = len(gains)

    def propose(self, rows: Sequence[Any], budgets: Sequence[Budget]) -> list[TokenTree]:
        raise NotImplementedError

    def expected(self, budget: Budget) -> float:
        return self.gains[min(budget.nodes, self.max_nodes)]


@dataclass
class Machine:
    """What a round costs here, with noise, and from some round on more."""

    costs: CostCurve
    draft: float
    node: float
    rest: float
    commit: float
    slower_from: int

    def times(self, turn: int, nodes: int, drafts: int, rng: random.Random) -> RoundTimes:
        noise = rng.uniform(0.95, 1.1) * (8.0 if rng.random() < 0.01 else 1.0)
        noise *= 1.5 if turn >= self.slower_from else 1.0
        drafting = (self.draft + self.node * drafts) if drafts else 1e-6
        rest = self.rest + self.commit * drafts
        return RoundTimes(drafting * noise, self.costs(nodes) * noise, nodes, drafts, rest * noise)


def machine(rng: random.Random) -> Machine:
    first, more = 1e-3, rng.choice([0.005, 0.02, 0.1, 0.4, 1.0]) * 1e-3
    curve = {n: first + more * (n - 1) * rng.uniform(0.8, 1.0) for n in (1, 2, 4, 8, 16, 32, 64)}
    return Machine(
        CostCurve(curve),
        draft=rng.choice([0.0, 0.2e-3]),
        node=rng.choice([0.0, 0.05e-3, 0.3e-3]),
        rest=rng.choice([0.0, 0.3e-3]),
        commit=rng.choice([0.0, 0.02e-3]),
        slower_from=rng.choice([ROUNDS, ROUNDS // 2]),
    )


def drafter(rng: random.Random) -> Drafter:
    if rng.random() < 0.5:
        return Chain()
    rate = rng.uniform(0.3, 0.97)
    return Table([rate ** (1 + node // 2) for node in range(rng.choice([9, 63]))])


def decisions(seed: int) -> list[list[int]]:
    """Draft nodes of each running request, round by round."""
    rng = random.Random(seed)
    here, drafts = machine(rng), drafter(rng)
    policy, slots = Goodput(here.costs), rng.choice([1, 1, 3, 6])
    rates = {slot: rng.choice(RATES) for slot in range(slots)}
    found = []
    for turn in range(ROUNDS):
        for slot in rates:
            if rng.random() < 0.01:
                policy.release(slot)
                rates[slot] = rng.choice(RATES)
        rows: list[Any] = [SimpleNamespace(slot=slot) for slot in rates if rng.random() < 0.95]
        if not rows:
            continue
        plan = [budget.nodes for budget in policy.plan(rows, drafts)]
        for row, nodes in zip(rows, plan, strict=True):
            accepted = next((d for d in range(nodes) if rng.random() > rates[row.slot]), nodes)
            if nodes:
                policy.observe(row, nodes, accepted, drafts.expected(Budget.of(nodes)))
                drafts.observe(row, chain(range(nodes + 1)), range(accepted + 1))
        policy.observe_round(here.times(turn, len(rows) + sum(plan), max(plan), rng))
        found.append(plan)
    return found


if __name__ == "__main__":
    recorded = {str(seed): decisions(seed) for seed in range(SCENARIOS)}
    FILE.write_text(json.dumps(recorded, separators=(",", ":")).replace(']],"', ']],\n"') + "\n")
