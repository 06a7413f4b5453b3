"""SpecDec++ in the virtual machine room: confidences are calibrated, drafts end where they stop paying."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from stories import Confident
from world import SIZES, Cell, Oracle, run

from linspec.decoding.tree import TokenTree, chain
from linspec.policies.base import RoundTimes
from linspec.policies.calibration import Calibration
from linspec.policies.costs import CostCurve
from linspec.policies.fixed import Fixed
from linspec.policies.specdec_pp import SpecDecPP

CELLS = [
    Cell("135m-int8", "confident", text, batch, busy=busy, requests=40 // batch)
    for text, batch, busy in (
        ("code", 1, False),
        ("code", 4, True),
        ("summary", 4, False),
        ("conversation", 4, False),
        ("mixed", 1, False),
        ("mixed", 4, True),
    )
]


@pytest.mark.crossed(3)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name.replace(" ", "-"))
def test_informative_confidences_are_worth_a_twentieth_over_the_best_fixed_size(cell: Cell) -> None:
    policy = SpecDecPP(cell.known())
    found = run(cell, policy)
    fixed = max(run(cell, Fixed(size), free=True).warm for size in SIZES)
    assert found.warm >= 1.05 * max(fixed, cell.plain())
    assert policy.calibration.error <= 0.05


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("drafter", ["confident", "heads", "lookup"])
def test_it_is_never_slower_than_plain(drafter: str, batch: int, busy: bool) -> None:
    """Also with drafters that give no confidences."""
    cell = Cell("135m-int8", drafter, "random", batch, busy=busy, requests=40 // batch)
    assert run(cell, SpecDecPP(cell.known())).rate >= 0.98 * cell.plain()


def test_the_oracle_is_near() -> None:
    cell = CELLS[0]
    oracle = run(cell, Oracle(cell), free=True).warm
    assert 0.95 * oracle <= run(cell, SpecDecPP(cell.known())).warm


def judged(calibration: Calibration, drafts: int, said: float, slope: float) -> None:
    """Drafts whose confidence is `slope` times the log-odds of what is true, and `said` more."""

    rng = random.Random(1)
    for _ in range(drafts):
        odds = rng.gauss(0.0, 1.5)
        confidence = 1 / (1 + math.exp(-(slope * odds + said)))
        calibration.observe(1, confidence, rng.random() < 1 / (1 + math.exp(-odds)))


@pytest.mark.parametrize(("said", "slope"), [(0.0, 1.0), (1.0, 1.0), (0.0, 2.5), (-1.0, 0.5)])
def test_a_drafter_that_is_too_sure_is_corrected(said: float, slope: float) -> None:
    calibration = Calibration()
    judged(calibration, 3000, said, slope)
    assert calibration.error <= 0.03
    # even odds are named by the confidence that the drafter has there

    assert calibration(1, 1 / (1 + math.exp(-said))) == pytest.approx(0.5, abs=0.08)
    # depths that were never judged are taken as they are
    assert calibration(3, 0.7) == pytest.approx(0.7)


def kept(confidences: list[float], node: float, parents: tuple[int, ...] | None = None) -> int:
    """How much of a tree is verified where a node costs so many plain rounds."""
    policy = SpecDecPP(CostCurve({1: 1.0, 64: 1.0 + 63 * node}))
    row: Any = SimpleNamespace(slot=0)
    shape = chain(range(len(confidences) + 1))
    tree = TokenTree(shape.tokens, parents or shape.parents, confidences=(1.0, *confidences))
    policy.plan([row], Confident())
    policy.observe_round(RoundTimes(0.0, 1.0, 1))
    policy.plan([row], Confident())
    return policy.keep(row, tree)


def test_a_tree_ends_where_its_nodes_cost_more_than_they_bring() -> None:
    sure = [0.9, 0.9, 0.9, 0.2, 0.9, 0.9]
    assert kept(sure, node=0.001) == 6
    assert kept(sure, node=0.3) == 3
    assert kept(sure, node=0.95) == 0
    # later nodes may pay for one that does not
    assert kept([0.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], node=0.15) == 7
    # siblings: the second child of the root brings what the first does not
    assert kept([0.5, 0.4, 0.1], node=0.3, parents=(-1, 0, 0, 0)) == 2


def test_a_tree_without_confidences_is_verified_whole() -> None:
    policy = SpecDecPP(CostCurve({1: 1.0}))
    assert policy.keep(SimpleNamespace(slot=0), chain(range(6))) == 5  # type: ignore[arg-type]


def test_a_model_that_nobody_was_asked_for_was_divided_by() -> None:
    """A drafter that is model_free, and then says of a tree that a model made it."""
    policy = SpecDecPP(CostCurve({1: 1.0, 64: 1.1}))
    row: Any = SimpleNamespace(slot=0, tokens=[1])
    drafter = Confident()
    drafter.model_free = True
    drafter.took_model = lambda _: True  # type: ignore[method-assign]
    for _ in range(3):
        policy.plan([row], drafter)
        policy.keep(row, replace(chain((1, 2)), confidences=(1.0, 0.9)))
        policy.observe(row, 1, 1, 0.9)
        policy.observe_round(RoundTimes(0.1, 1.0, 2, 1))
