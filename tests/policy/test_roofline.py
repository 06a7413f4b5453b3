"""A curve of step times from a few of them (HELP), on machines that do not exist and some that do."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from world import CURVES

from linspec.policies import costs
from linspec.policies.base import RoundTimes
from linspec.policies.costs import MEASURED_NODES, CostCurve, doubt, load_or_measure, measure
from linspec.policies.goodput import Goodput
from linspec.policies.roofline import SIZES, completed, device
from linspec.policies.specdec_pp import SpecDecPP


def machines(number: int = 60) -> list[dict[int, float]]:
    """Others than those that the prior is made of."""
    rng = random.Random(99)
    return [dict(zip(SIZES, device(rng), strict=True)) for _ in range(number)]


def ranks(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(place) for place in range(len(values))]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.correlation(ranks(a), ranks(b))


@pytest.mark.parametrize("sizes", [(1, 8, 32), MEASURED_NODES], ids=["three", "four"])
def test_a_few_steps_predict_the_others(sizes: tuple[int, ...]) -> None:
    errors, orders = [], []
    for true in machines():
        found = completed({nodes: true[nodes] for nodes in sizes})
        errors += [abs(found[nodes] / true[nodes] - 1) for nodes in SIZES if nodes not in sizes]
        orders.append(spearman(list(found.values()), list(true.values())))
    assert statistics.median(errors) <= 0.06
    assert sorted(errors)[len(errors) * 9 // 10] <= 0.2
    assert statistics.mean(orders) >= 0.95


def test_the_prior_is_worth_having() -> None:
    """Half the error of straight lines between the same steps, in the tenth where these are worst."""
    errors: dict[str, list[float]] = {"lines": [], "prior": []}
    for true in machines():
        few = {nodes: true[nodes] for nodes in (1, 8, 32)}
        found, line = completed(few), CostCurve(few)
        for nodes in (2, 3, 4, 6, 48, 64):
            errors["prior"].append(abs(found[nodes] / true[nodes] - 1))
            errors["lines"].append(abs(line(nodes) / true[nodes] - 1))
    tail = {name: sorted(each)[len(each) * 9 // 10] for name, each in errors.items()}
    assert tail["prior"] < tail["lines"]


@pytest.mark.parametrize("name", CURVES)
def test_recorded_machines_are_predicted(name: str) -> None:
    true = CURVES[name]
    found = CostCurve(completed({nodes: true(nodes) for nodes in MEASURED_NODES}))
    errors = [abs(found(nodes) / true(nodes) - 1) for nodes in (1, 2, 4, 8, 16, 32, 64)]
    assert statistics.median(errors) <= 0.1 and max(errors) <= 0.2


def test_curves_rise_and_keep_what_was_measured() -> None:
    for true in machines():
        found = completed({nodes: true[nodes] for nodes in MEASURED_NODES})
        assert all(low <= high for low, high in pairwise(found.values()))
        assert found[1] == pytest.approx(true[1], rel=0.1)
    assert completed({1: 2.0})[64] > completed({1: 2.0})[1] == pytest.approx(2.0, rel=0.01)


class Busy:
    """A model whose steps take as long as a curve says, on a core that is taken away now and then."""

    config = SimpleNamespace(position_limit=None)
    device = SimpleNamespace(type="cpu")

    def __init__(self, curve: CostCurve, busy: bool) -> None:
        self.curve, self.now, self.rng = curve, 0.0, random.Random(4)
        self.busy, self.until, self.factor, self.steps = busy, 0.0, 1.0, 0

    def new_state(self) -> Any:
        return SimpleNamespace(
            commit=lambda *_: None, drop=lambda *_: None, bytes_at=lambda length: 1000 * length
        )

    def parameters(self) -> list[torch.Tensor]:
        return [torch.zeros(10**6)]

    def buffers(self) -> list[torch.Tensor]:
        return []

    def open(self, tokens: list[int], slot: int, state: Any) -> tuple[list[int], tuple[int, ...]]:
        return tokens, ()

    def step(self, inputs: Any, state: Any) -> None:
        if self.busy and self.now >= self.until:
            self.factor = 1.9 if self.factor == 1.0 else 1.0
            self.until = self.now + self.rng.expovariate(1 / 0.05)
        self.steps += 1
        self.now += self.curve(len(inputs[0].tokens)) * self.factor * self.rng.uniform(1.0, 1.1)


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "busy"])
@pytest.mark.parametrize("name", CURVES)
def test_a_curve_that_was_measured_on_a_busy_machine_has_the_right_shape(
    name: str, busy: bool
) -> None:
    """Each size once had its own busy moment, and the curve was kept for good."""
    model = Busy(CURVES[name], busy)
    found = measure(model, clock=lambda: model.now)  # type: ignore[arg-type]
    for nodes in (2, 4, 8, 16):
        true = CURVES[name](nodes) / CURVES[name](1)
        assert found(nodes) / found(1) == pytest.approx(true, rel=0.25)
    # seven sizes once took 21 to 140 steps, half of them of 16 nodes and more
    assert model.steps <= 1 + 8 * len(MEASURED_NODES)


def test_rounds_that_contradict_the_curve_make_the_next_process_measure_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "_cache_path", lambda model: tmp_path / "curve.json")
    ticks = count()
    measured: list[int] = []

    def clock() -> float:
        measured.append(1)
        return float(next(ticks))

    model: Any = Busy(CURVES["135m"], busy=False)
    for process in range(6):
        measured.clear()
        load_or_measure(model, clock)
        # measured in the first process, and again after each doubt, twice at most
        assert bool(measured) == (process < 3)
        doubt(model)


@pytest.mark.parametrize("kind", [Goodput, SpecDecPP])
def test_a_policy_doubts_a_curve_that_is_wrong_and_no_other(
    kind: type[Goodput] | type[SpecDecPP],
) -> None:
    """Measured where 8 nodes seemed to cost five times what they do."""
    true = CostCurve({1: 1.0, 2: 1.05, 5: 1.2, 9: 1.4, 64: 8.0})
    for wrong, doubts in ((1.0, 0), (5.0, 1)):
        told: list[int] = []
        known = CostCurve({n: 1 + wrong * (s - 1) for n, s in true.seconds.items()})
        policy = kind(known, lambda: told.append(1))  # noqa: B023
        rng = random.Random(3)
        for turn in range(600):
            drafts = (0, 4, 8, 4)[turn % 4]
            seconds = true(1 + drafts) * rng.uniform(0.97, 1.05)
            policy.observe_round(RoundTimes(0.01, seconds, 1 + drafts, drafts))
        assert len(told) == doubts
