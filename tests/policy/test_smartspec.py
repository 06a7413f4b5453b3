"""SmartSpec's proofs (Liu et al. 2024): requests come at four loads; unseen rounds are predicted."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import pytest
from replays import LOADS, SLOTS, arrivals, best_fixed, replay
from stories import TEXTS, Text
from world import CURVES, Cell

from linspec.policies.base import RoundTimes
from linspec.policies.cost_model import CostModel
from linspec.policies.costs import MEASURED_NODES, CostCurve
from linspec.policies.fixed import Fixed
from linspec.policies.goodput import Goodput
from linspec.policies.roofline import completed

# `python tests/policy/replays.py` has more of them
CELLS = [
    Cell("135m-int8", "model", "code", requests=80),
    Cell("1b-int8", "heads", "code", requests=80),
    Cell("linear", "lookup", "repetitive", requests=80),
]


@pytest.mark.crossed(3)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name.replace(" ", "-"))
def test_latency_is_near_that_of_the_best_size_at_every_load(cell: Cell, load: float) -> None:
    """Proof (v): no more than 1.05 times the least of all fixed sizes and of no drafts."""
    found, _ = replay(cell, Goodput(cell.known()), load)
    least, size = best_fixed(cell, load)
    assert found <= 1.05 * least, size


def test_the_best_size_depends_on_the_load() -> None:
    """Otherwise the replay would show nothing."""
    low, high = (best_fixed(CELLS[0], load)[1] for load in (LOADS[0], LOADS[-1]))
    assert low > high


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("machine", ["135m-int8", "1b-int8"])
def test_a_drafter_that_is_right_one_time_in_ten_is_off_after_two_scans(
    machine: str, load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proof (v), whatever the load is; what comes later is an attempt of one sequence now and then."""
    monkeypatch.setitem(TEXTS, "tenth", Text(heads=(0.1,), spread=0.0))
    cell = Cell(machine, "model", "tenth", requests=60)

    class Scanning(Goodput):
        scans: list[int]

        def plan(self, sequences, drafter):  # type: ignore[no-untyped-def]
            budgets = super().plan(sequences, drafter)
            self.scans = [*getattr(self, "scans", []), self.choices]
            return budgets

    policy = Scanning(cell.known())
    _, room = replay(cell, policy, load)
    drafted = next(i for i, plan in enumerate(room.found.plans) if any(plan))
    first = policy.scans[drafted]
    later = [
        plan for plan, scan in zip(room.found.plans, policy.scans, strict=True) if scan > first + 2
    ]
    assert len(later) > 100
    # a lucky attempt may make the others try too, for a plan or two
    assert sum(sum(map(bool, plan)) > 1 for plan in later) <= 0.01 * len(later)
    assert sum(map(any, later)) <= 0.06 * len(later)


def test_arrivals_are_a_share_of_what_the_machine_answers() -> None:
    cell = Cell("135m-int8", requests=4000)
    for load in LOADS:
        come = arrivals(cell, load, 1)
        asked = cell.requests * cell.answer / come[-1]
        full = Cell("135m-int8", batch=SLOTS).plain()
        assert asked / full == pytest.approx(load, rel=0.05)
    # alone, a request takes its own time
    seconds, _ = replay(Cell("135m-int8", requests=5), Fixed(0), 1e-4, free=True)
    assert seconds == pytest.approx(cell.answer / cell.plain())


def explained(true: Sequence[float], said: Sequence[float]) -> float:
    """R²: the share of the variance of what was that what was said explains."""
    mean = statistics.mean(true)
    off = sum((a - b) ** 2 for a, b in zip(true, said, strict=True))
    return 1 - off / sum((a - mean) ** 2 for a in true)


@pytest.mark.parametrize("machine", CURVES)
def test_rounds_that_were_never_seen_are_predicted(machine: str) -> None:
    """Proof (ii): R² at least 0.95 and a mean error of 15% at most, from steps of four sizes and from rounds.

    Steps are recorded ones; around them a round costs what the machine room says. The fitted model is told
    noisy seconds of small batches, and asked about larger ones too.
    """
    true, rng = CURVES[machine], random.Random(7)
    known = completed({n: true(n) * rng.uniform(1.0, 1.05) for n in MEASURED_NODES})
    model, cell = CostModel(CostCurve(known)), Cell(machine)
    for turn in range(400):
        count, drafts = rng.choice((1, 2, 4)), rng.choice((1, 2, 4, 8)) if turn % 4 else 0
        slower = rng.lognormvariate(0.0, 0.03)
        model.count = count
        model.observe(told(cell, true, [drafts] * count, slower))
    real, said = [], []
    for count in (1, 2, 3, 4, 6, 8):
        for drafts in (0, 1, 2, 3, 5, 6, 7):
            if count * (1 + drafts) <= 64:
                times = told(cell, true, [drafts] * count, 1.0)
                model.count = count
                real.append(times.draft + times.step + times.rest)
                said.append(model.round(times.nodes) + (model.drafting(drafts) if drafts else 0.0))
    assert explained(real, said) >= 0.95
    assert statistics.mean(abs(a / b - 1) for a, b in zip(said, real, strict=True)) <= 0.15


def told(cell: Cell, true: CostCurve, counts: Sequence[int], slower: float) -> RoundTimes:
    """A round of a machine; its drafts are those of trained heads."""
    nodes, most = len(counts) + sum(counts), max(counts)
    draft = 0.14 * true(1) if most else 0.0
    draft, step, rest = (slower * each for each in (draft, true(nodes), cell.rest(counts)))
    return RoundTimes(draft, step, nodes, most, rest)
