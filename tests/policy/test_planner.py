"""The parts of the automatic policy alone, on made-up numbers: no model, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from decisions import Table

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree, chain
from linspec.policies.acceptance import AcceptanceModel
from linspec.policies.base import RoundTimes
from linspec.policies.cost_model import CostModel
from linspec.policies.costs import MEASURED_NODES, CostCurve, measure
from linspec.policies.exploration import Exploration
from linspec.policies.planner import CANDIDATES, Choice, choose, next_size, sizes_up_to


@dataclass(frozen=True)
class Line:
    """A machine on which a round costs `base` and so much more a node, and a draft so much."""

    base: float = 1.0
    node: float = 0.0
    draft: float = 0.0

    def round(self, nodes: int) -> float:
        return self.base + self.node * nodes

    def drafting(self, drafts: int) -> float:
        return self.draft * drafts


PERFECT = {nodes: float(nodes) for nodes in CANDIDATES}
# each draft right half the time: never more than one accepted
HALVES = {nodes: 1 - 0.5**nodes for nodes in CANDIDATES}


@pytest.mark.parametrize(
    ("ratios", "gains", "costs", "chosen"),
    [
        # nodes cost nothing: as many as there may be
        ([1.0], PERFECT, Line(), (63,)),
        ([1.0], dict(list(PERFECT.items())[:5]), Line(), (6,)),
        # a node costs a whole round, or a draft does: none
        ([1.0], PERFECT, Line(base=0.0, node=1.0), (0,)),
        ([1.0], PERFECT, Line(draft=1.0), (0,)),
        # a second draft brings a quarter of a token for a tenth of the round, a fourth a sixteenth
        ([1.0], HALVES, Line(node=0.1), (2,)),
        # what is never accepted is not drafted, at no cost either: it promises nothing
        ([0.0], PERFECT, Line(), (0,)),
        # those that do well get trees, the others do not pay for their share of the step
        ([0.1, 1.0, 0.05], HALVES, Line(node=0.2), (0, 1, 0)),
        # nobody is promised more than was drafted: 8 of 8, and from there on not one more
        ([9.0], HALVES, Line(node=0.5), (8,)),
    ],
)
def test_the_size_with_the_most_tokens_per_second_is_chosen(
    ratios: list[float], gains: dict[int, float], costs: Line, chosen: tuple[int, ...]
) -> None:
    assert choose(ratios, gains, costs).nodes == chosen


def test_a_gain_below_the_margin_is_left() -> None:
    """1.02 tokens in the time of one are not worth a change, 1.05 are."""
    assert choose([1.0], {1: 0.02}, Line()).nodes == (0,)
    assert choose([1.0], {1: 0.05}, Line()).nodes == (1,)


def test_hope_is_about_perfect_drafts() -> None:
    assert choose([0.0], PERFECT, Line()) == Choice((0,), hopeful=True)
    assert choose([0.0], PERFECT, Line(draft=1.0)) == Choice((0,), hopeful=False)


def test_sizes() -> None:
    assert sizes_up_to(5) == (1, 2, 3, 4)
    assert sizes_up_to(0) == ()
    assert all(next_size(a) == b for a, b in pairwise(CANDIDATES))
    assert next_size(CANDIDATES[-1]) == CANDIDATES[-1]


def test_a_drafter_is_tried_again_ever_more_rarely() -> None:
    exploration = Exploration()
    exploration.began(0)
    tries = [turn for turn in range(1, 3000) if exploration.due(0, hopeful=True)]
    assert [b - a for a, b in pairwise([0, *tries])] == [16, 32, 64, 128, 256, 512, 512, 512, 512]
    # another request is as patient
    exploration.began(1)
    assert not any(exploration.due(1, hopeful=True) for _ in range(511))
    # drafts that pay make all of them try early again
    exploration.planned(0)
    exploration.began(2)
    for slot in (0, 2):
        assert [exploration.due(slot, hopeful=True) for _ in range(16)] == [False] * 15 + [True]
    # where nothing could pay it is tried as rarely as possible
    exploration.succeeded(2)
    assert not any(exploration.due(2, hopeful=False) for _ in range(511))


def test_a_request_is_measured_against_what_its_drafter_expects() -> None:
    model = AcceptanceModel()
    model.began(0)
    assert model.ratio(0) == 1.0
    for _ in range(50):
        model.observe(0, accepted=1, expected=2.0)
    assert model.ratio(0) == pytest.approx(0.5, abs=0.03)
    # what one request taught the next one knows, and it learns on by itself
    model.began(1)
    assert model.ratio(1) == pytest.approx(0.5, abs=0.03)
    model.observe(1, accepted=4, expected=2.0)
    assert model.ratio(0) < 0.55 < 1 < model.ratio(1)
    model.release(1)
    model.began(1)
    assert model.ratio(1) < 1


def test_confidences_of_a_drafter_count_along_the_paths() -> None:
    drafter = Table([0.9, 0.8, 0.7])
    anyone = RunningSequence(1, Sampler(SamplingParams(), [1], 9), [1], 1)
    assert drafter.score(anyone, chain([1, 2, 3])) == pytest.approx(1.7)
    sure = TokenTree((1, 2, 3, 4), (-1, 0, 1, 0), confidences=(1.0, 0.5, 0.5, 0.25))
    assert drafter.score(anyone, sure) == 0.5 + 0.25 + 0.25


def test_rounds_correct_what_was_measured() -> None:
    """A machine twice as slow as its curve says, with a fixed cost beside the step."""
    model = CostModel(CostCurve({1: 1.0, 64: 64.0}))
    assert model.round(1) == 1.0 and model.drafting(4) == 0.0
    for _ in range(100):
        model.observe(RoundTimes(draft=0.0, step=2.0, nodes=1, rest=0.5))
    assert model.round(1) == pytest.approx(2.5, rel=1e-3)
    assert model.round(3) == pytest.approx(6.5, rel=1e-3)
    for drafts in (2, 4) * 50:
        step = 2.0 * (1 + drafts)
        model.observe(RoundTimes(0.25 * drafts, step, 1 + drafts, drafts, rest=0.5))
    assert model.largest == 4
    assert model.drafting(3) == pytest.approx(0.75, rel=1e-2)
    assert model.drafting(8) == pytest.approx(2.0, rel=1e-2)


def test_one_disturbed_round_changes_little() -> None:
    model = CostModel(CostCurve({1: 1.0}))
    model.observe(RoundTimes(draft=0.0, step=1000.0, nodes=1))
    assert model.round(1) <= 1.1


def test_the_curve_is_measured_by_the_clock_that_was_given() -> None:
    """Steps of a fake model take as long as a fake clock says: one second and a tenth for each node."""
    now = [0.0]

    class Fake:
        config = SimpleNamespace(position_limit=40)
        device = SimpleNamespace(type="cpu")

        def new_state(self) -> Any:
            nothing: Callable[..., None] = lambda *_: None  # noqa: E731
            return SimpleNamespace(commit=nothing, drop=nothing)

        def open(
            self, tokens: list[int], slot: int, state: Any
        ) -> tuple[list[int], tuple[int, ...]]:
            return tokens, ()

        def step(self, inputs: Any, state: Any) -> None:
            now[0] += 1.0 + 0.1 * len(inputs[0].tokens)

    curve = measure(Fake(), clock=lambda: now[0])  # type: ignore[arg-type]
    # no step goes beyond the last position
    assert set(curve.seconds) == {nodes for nodes in MEASURED_NODES if 20 + nodes <= 40}
    assert {n: round(s, 6) for n, s in curve.seconds.items()} == {
        n: round(1.0 + 0.1 * n, 6) for n in curve.seconds
    }


def test_a_first_draft_that_makes_its_weights_does_not_switch_drafting_off() -> None:
    """Heads once packed a quarter of a second long in their first round, and drafted no more."""
    model = CostModel(CostCurve({1: 1.0, 4: 1.2}))
    model.observe(RoundTimes(draft=0.0, step=1.0, nodes=1, rest=0.1))
    model.observe(RoundTimes(draft=80.0, step=5.0, nodes=4, drafts=3, rest=0.1))
    assert model.drafting(3) == 0.0
    model.observe(RoundTimes(draft=0.1, step=1.2, nodes=4, drafts=3, rest=0.1))
    assert model.drafting(3) == pytest.approx(0.1)


def test_a_draft_that_something_else_delayed_counts_at_most_twice() -> None:
    model = CostModel(CostCurve({1: 1.0, 4: 1.2}))
    model.observe(RoundTimes(draft=0.0, step=1.0, nodes=1, rest=0.0))
    for _ in range(9):
        model.observe(RoundTimes(draft=0.1, step=1.2, nodes=4, drafts=3, rest=0.0))
    model.observe(RoundTimes(draft=30.0, step=1.2, nodes=4, drafts=3, rest=0.0))
    assert model.drafting(3) < 0.12
