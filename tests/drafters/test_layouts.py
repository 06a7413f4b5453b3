"""Layouts of guesses and probes: what they promise is what a chain of rounds brings, and none is better."""

from __future__ import annotations

import itertools
import random

import pytest

from linspec.drafters.guesses import GuessTree
from linspec.drafters.layouts import Layout, Layouts

ACCURACIES = [[0.6, 0.15, 0.05], [0.4, 0.1, 0.05], [0.25, 0.1]]
TREES = [GuessTree.of(ACCURACIES[:level], 40) for level in range(4)]


def simulated(layouts: list[Layout], rounds: int = 40_000) -> float:
    """Accepted drafts per round, where every guess is right as often as it says, whatever the others are."""
    rng, level, accepted = random.Random(0), 0, 0
    for _ in range(rounds):
        tree, layout = TREES[level], layouts[level]
        right = [_rank(rng, rates) for rates in ACCURACIES[:level]]
        node = 0
        for below in range(1, layout.nodes + 1):
            path = tree.paths[below - 1]
            if tree.parents[below] == node and path[-1] == right[len(path) - 1]:
                node = below
                accepted += 1
        level = layout.probes[node]
    return accepted / rounds


def _rank(rng: random.Random, rates: list[float]) -> int | None:
    drawn = rng.random()
    for rank, rate in enumerate(rates):
        drawn -= rate
        if drawn < 0:
            return rank
    return None


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 30])
def test_the_gain_is_what_rounds_bring(rows: int) -> None:
    layouts = Layouts(TREES, rows)
    assert layouts.gain == pytest.approx(simulated(layouts.of_level), rel=0.04)
    for level, layout in enumerate(layouts.of_level):
        assert layout.nodes + sum(layout.probes) <= rows
        assert len(layout.probes) == layout.nodes + 1
        assert all(len(path) <= level for path in TREES[level].paths[: layout.nodes])
        assert max(layout.probes) <= 3


@pytest.mark.parametrize("rows", range(3, 40, 4))
def test_no_static_layout_with_all_probes_everywhere_is_better(rows: int) -> None:
    layouts = Layouts(TREES, rows)
    nodes = (rows - 3) // 4
    static = [
        Layout(min(nodes, len(t.paths)), (3,) * (1 + min(nodes, len(t.paths)))) for t in TREES
    ]
    assert layouts.gain >= layouts.judged(static)[1] - 1e-9


def test_more_rows_never_bring_less() -> None:
    gains = [Layouts(TREES, rows).gain for rows in range(1, 41)]
    assert all(more >= less - 1e-9 for less, more in itertools.pairwise(gains))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_small_budgets_are_as_good_as_any_layouts(rows: int) -> None:
    """By trying every layout with two levels."""
    trees = TREES[:3]
    options = [
        [
            Layout(nodes, probes)
            for nodes in range(min(rows, len(tree.paths)) + 1)
            for probes in itertools.product(range(3), repeat=nodes + 1)
            if nodes + sum(probes) <= rows
        ]
        for tree in trees
    ]
    found = Layouts(trees, rows)
    if rows > 2:
        rng = random.Random(rows)
        options = [rng.sample(each, min(14, len(each))) for each in options]
    best = max(found.judged(list(each))[1] for each in itertools.product(*options))
    assert found.gain >= best - 1e-6


def test_guesses_that_are_never_right_get_no_rows() -> None:
    trees = [GuessTree.of([[0.5, 0.0], [0.0]][:level], 10) for level in range(3)]
    layouts = Layouts(trees, 8)
    assert layouts.of_level[2].nodes == 1
    assert layouts.gain == pytest.approx(0.5)
