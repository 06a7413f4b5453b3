"""The automatic policy on simulated machines: a round costs what a curve says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from linspec.decoding.tree import Budget, chain
from linspec.drafters.base import ChainDrafter
from linspec.errors import ConfigError
from linspec.policies.base import RoundTimes
from linspec.policies.costs import CostCurve
from linspec.policies.fixed import Fixed
from linspec.policies.goodput import Goodput

# one row for 1 ms, eight for 1.2 ms, then each further one a tenth: a machine that verifies cheaply
CHEAP = CostCurve({1: 1.0e-3, 8: 1.2e-3, 64: 7.0e-3})
# every node costs as much as the first
DEAR = CostCurve({1: 1.0e-3, 64: 64.0e-3})


class Simulated(ChainDrafter):
    """A chain drafter whose first `right` drafts of a round are accepted."""

    name = "test-simulated"

    def __init__(self, right: Callable[[int], int]) -> None:
        super().__init__()
        self.right = right

    def draft(self, rows: Sequence[Any], lengths: Sequence[int]) -> list[list[int]]:
        raise NotImplementedError


def simulate(
    drafter: Simulated,
    costs: CostCurve,
    *,
    rounds: int,
    draft: Callable[[int], float] = lambda nodes: 0.0,
    rest: Callable[[int], float] = lambda nodes: 0.0,
    slower: Callable[[int], float] = lambda nodes: 1.0,
    policy: Goodput | None = None,
    rows: int = 1,
) -> tuple[int, float, int, list[int]]:
    """(emitted tokens, seconds, draft nodes, budgets of the first row)."""
    policy = policy or Goodput(costs)
    slots: list[Any] = [SimpleNamespace(slot=i) for i in range(rows)]
    tokens, seconds, nodes, budgets = 0, 0.0, 0, []
    for turn in range(rounds):
        plan = [budget.nodes for budget in policy.plan(slots, drafter)]
        budgets.append(plan[0])
        times = RoundTimes(
            draft=draft(max(plan)) if max(plan) else 1e-6,
            step=costs(rows + sum(plan)) * slower(max(plan)),
            nodes=rows + sum(plan),
            drafts=max(plan),
            rest=rest(max(plan)),
        )
        for row, budget in zip(slots, plan, strict=True):
            accepted = min(budget, drafter.right(turn))
            if budget:
                policy.observe(row, budget, accepted, drafter.expected(Budget.of(budget)))
                drafter.observe(row, chain(range(budget + 1)), range(accepted + 1))
            tokens += accepted + 1
        policy.observe_round(times)
        seconds += times.draft + times.step + times.rest
        nodes += sum(plan)
    for row in slots:
        policy.release(row.slot)
    return tokens, seconds, nodes, budgets


def plain_seconds(costs: CostCurve, tokens: int, rows: int = 1) -> float:
    return tokens / rows * costs(rows)


@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_a_hopeless_drafter_is_switched_off(costs: CostCurve) -> None:
    tokens, seconds, nodes, budgets = simulate(Simulated(lambda turn: 0), costs, rounds=1000)
    assert nodes <= 0.06 * tokens
    assert seconds <= 1.03 * plain_seconds(costs, tokens)
    assert budgets[-1] == 0


def test_what_one_request_taught_the_next_one_knows() -> None:
    policy, drafter = Goodput(CHEAP), Simulated(lambda turn: 0)
    simulate(drafter, CHEAP, rounds=200, policy=policy)
    found = [simulate(drafter, CHEAP, rounds=15, policy=policy) for _ in range(20)]
    # each is tried once at most, for a hundredth of the time
    assert max(nodes for _, _, nodes, _ in found) <= 2
    tokens, seconds = (sum(each[part] for each in found) for part in (0, 1))
    assert seconds <= 1.01 * plain_seconds(CHEAP, int(tokens))


def test_a_perfect_drafter_gets_large_trees() -> None:
    tokens, seconds, _, budgets = simulate(Simulated(lambda turn: 99), CHEAP, rounds=300)
    assert budgets[-1] >= 32
    assert seconds < 0.25 * plain_seconds(CHEAP, tokens)


def test_a_draft_of_two_good_tokens_gets_a_small_tree() -> None:
    _, _, _, budgets = simulate(Simulated(lambda turn: 2), CHEAP, rounds=300)
    assert sorted(budgets[-50:])[25] in (2, 3, 4)


def test_drafts_that_cost_more_than_they_bring_are_left_out() -> None:
    """A draft model as slow as its target: right every time, and still a loss."""
    tokens, seconds, _, budgets = simulate(
        Simulated(lambda turn: 99), CHEAP, rounds=1500, draft=lambda nodes: 1.3e-3 * nodes
    )
    assert budgets[-1] in (0, 4)
    assert seconds <= 1.05 * plain_seconds(CHEAP, tokens)


def test_a_cheap_draft_model_is_used_at_the_depth_that_pays() -> None:
    tokens, seconds, _, budgets = simulate(
        Simulated(lambda turn: 4), CHEAP, rounds=600, draft=lambda nodes: 0.15e-3 * nodes
    )
    assert sorted(budgets[-50:])[25] in (3, 4, 6)
    assert seconds < 0.6 * plain_seconds(CHEAP, tokens)


def test_a_drafter_earns_its_place_back() -> None:
    drafter = Simulated(lambda turn: 99 if turn > 300 else 0)
    assert simulate(drafter, CHEAP, rounds=1200)[3][-1] >= 8


def test_rows_of_a_batch_are_planned_together() -> None:
    tokens, seconds, nodes, _ = simulate(Simulated(lambda turn: 0), CHEAP, rounds=400, rows=6)
    assert nodes <= 0.08 * tokens
    assert seconds <= 1.05 * plain_seconds(CHEAP, tokens, rows=6)


def test_fixed_budgets() -> None:
    drafter = Simulated(lambda turn: 0)
    assert Fixed(5).plan([None, None], drafter) == [Budget(5, 5)] * 2  # type: ignore[list-item]
    assert Fixed(63).plan([None], drafter) == [Budget.of(drafter.max_nodes)]  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="0"):
        Fixed(-1)


def test_short_requests_do_not_each_try_a_hopeless_drafter_again() -> None:
    """They once did: each began with the impatience of the first."""
    policy, drafter = Goodput(CHEAP), Simulated(lambda turn: 0)
    for _ in range(5):
        simulate(drafter, CHEAP, rounds=64, policy=policy)
    drafted = [
        budget
        for _ in range(20)
        for budget in simulate(drafter, CHEAP, rounds=64, policy=policy)[3]
        if budget
    ]
    assert len(drafted) <= 20


def test_what_every_round_costs_beside_its_step_makes_drafts_pay() -> None:
    """They once were left out: half of a small model's round is not its step."""
    steep = CostCurve({1: 0.1e-3, 64: 6.4e-3})
    two = Simulated(lambda turn: 2)
    assert simulate(two, steep, rounds=300)[3][-1] in (0, 4)
    budgets = simulate(two, steep, rounds=300, rest=lambda nodes: 0.3e-3)[3]
    assert sorted(budgets[-50:])[25] == 2


def test_trees_that_take_long_to_commit_are_left_out() -> None:
    budgets = simulate(
        Simulated(lambda turn: 2), CHEAP, rounds=500, rest=lambda nodes: 4e-3 if nodes else 0.2e-3
    )[3]
    # but for the attempts
    assert sum(map(bool, budgets[100:])) <= 400 // 12


def test_steps_that_drafting_makes_slower_are_left_out() -> None:
    """They once raised what plain rounds were believed to cost, and drafting went on at a loss."""
    budgets = simulate(
        Simulated(lambda turn: 2), CHEAP, rounds=500, slower=lambda nodes: 4.0 if nodes else 1.0
    )[3]
    assert sum(map(bool, budgets[100:])) <= 400 // 12


def test_a_machine_that_becomes_slower_does_not_switch_drafting_off() -> None:
    turns = iter(range(10**6))
    budgets = simulate(
        Simulated(lambda turn: 3), CHEAP, rounds=1000, slower=lambda n: 1.0 + (next(turns) > 200)
    )[3]
    assert sum(map(bool, budgets[-300:])) >= 250
