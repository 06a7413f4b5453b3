"""The parts of the automatic policy alone, on made-up numbers: no model, no clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
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
from linspec.policies.planner import (
    CANDIDATES,
    Choice,
    affordable,
    choose,
    next_size,
    sizes_up_to,
    steps_of,
)
from linspec.policies.ratios import Ratios


@dataclass(frozen=True)
class Line:
    """A machine on which a round costs `base` and so much more a node, and a draft so much."""

    base: float = 1.0
    node: float = 0.0
    draft: float = 0.0

    def round(self, nodes: float) -> float:
        return self.base + self.node * nodes

    def drafting(self, drafts: int) -> float:
        return self.draft * drafts

    def asking(self) -> float:
        return 0.0


PERFECT = {nodes: float(nodes) for nodes in CANDIDATES}
# each draft right half the time: never more than one accepted
HALVES = {nodes: 1 - 0.5**nodes for nodes in CANDIDATES}


def best(hardness: list[float], gains: dict[int, float], costs: Line, found: float = 1.0) -> Choice:
    return choose(hardness, steps_of(gains), tuple(gains), costs, found)


@pytest.mark.parametrize(
    ("hardness", "gains", "costs", "chosen"),
    [
        # nodes cost nothing: as many as there may be
        ([1.0], PERFECT, Line(), (63,)),
        ([1.0], dict(list(PERFECT.items())[:5]), Line(), (6,)),
        # a node costs a whole round, or a draft does: none
        ([1.0], PERFECT, Line(base=0.0, node=1.0), (0,)),
        ([1.0], PERFECT, Line(draft=1.0), (0,)),
        # a second draft brings a quarter of a token for a tenth of the round, a fourth a sixteenth
        ([1.0], HALVES, Line(node=0.1), (2,)),
        # what is hardly ever accepted is not drafted
        ([20.0], HALVES, Line(node=0.01), (0,)),
        # those that do well get trees, the others do not pay for their share of the step
        ([4.0, 1.0, 5.0], HALVES, Line(node=0.2), (0, 1, 0)),
        # those that do better get larger ones
        ([0.2, 1.0], HALVES, Line(base=2.0, node=0.2), (8, 1)),
    ],
)
def test_the_size_with_the_most_tokens_per_second_is_chosen(
    hardness: list[float], gains: dict[int, float], costs: Line, chosen: tuple[int, ...]
) -> None:
    assert best(hardness, gains, costs).nodes == chosen


def test_a_gain_below_the_margin_is_left() -> None:
    """1.02 tokens in the time of one are not worth a change, 1.05 are."""
    assert best([1.0], {1: 0.02}, Line()).nodes == (0,)
    assert best([1.0], {1: 0.05}, Line()).nodes == (1,)


def test_hope_is_about_perfect_drafts() -> None:
    assert best([50.0], HALVES, Line(node=0.1)) == Choice((0,), hopeful=True)
    assert best([1.0], PERFECT, Line(draft=1.0)) == Choice((0,), hopeful=False)


def goodput(sizes: Sequence[int], rates: Sequence[float], costs: Line) -> float:
    tokens = sum(
        1 + sum(rate**depth for depth in range(1, size + 1))
        for size, rate in zip(sizes, rates, strict=True)
    )
    drafting = costs.drafting(max(sizes))
    return tokens / (costs.round(len(sizes) + sum(sizes)) + drafting)


def states() -> Iterator[tuple[list[float], Line]]:
    rng = random.Random(5)
    for _ in range(300):
        rates = [rng.uniform(0.05, 0.95) for _ in range(rng.choice([1, 1, 2, 3]))]
        yield rates, Line(1.0, rng.choice([0.01, 0.05, 0.2, 0.6]), rng.choice([0.0, 0.0, 0.1]))


def test_what_is_chosen_is_what_trying_every_choice_finds() -> None:
    """SmartSpec's proof (iii), for a batch whose sequences differ: 95 of 100 within a hundredth of the best.

    The drafter says a half at each depth; a request's own rate is a power of that.
    """
    sizes, right, found = (1, 2, 3, 4, 6), 0, list(states())
    for rates, costs in found:
        gains = {size: 1 - 0.5**size for size in sizes}
        hardness = [math.log(rate) / math.log(0.5) for rate in rates]
        mine = choose(hardness, steps_of(gains), sizes, costs).nodes
        every = product((0, *sizes), repeat=len(rates))
        most = max(goodput(each, rates, costs) for each in every)
        plain = goodput([0] * len(rates), rates, costs)
        # a gain below the margin is left
        right += goodput(mine, rates, costs) >= min(0.99 * most, max(plain, most / 1.04))
    assert right >= 0.95 * len(found)


def test_more_requests_get_no_larger_trees_and_easier_ones_no_smaller() -> None:
    """SmartSpec's proof (iv)."""
    gains = {size: sum(0.7**d for d in range(1, size + 1)) for size in CANDIDATES}
    costs = Line(node=0.03, draft=0.01)
    by_count = [max(best([1.0] * count, gains, costs).nodes) for count in (1, 2, 4, 8, 16, 32)]
    assert by_count == sorted(by_count, reverse=True) and by_count[0] > by_count[-1]
    by_rate = [best([hard], gains, costs).nodes[0] for hard in (4.0, 2.0, 1.0, 0.5, 0.2, 0.05)]
    assert by_rate == sorted(by_rate) and by_rate[0] < by_rate[-1]


def test_trees_that_are_seldom_found_count_for_what_they_cost() -> None:
    """Of 16 requests two find something to copy: their drafts cost two trees, not sixteen."""
    curve = CostCurve({1: 1.0, 24: 1.0, 25: 4.0, 64: 12.0})

    class Steep(Line):
        def round(self, nodes: float) -> float:
            return curve(nodes)

    gains = {size: 0.9 * size for size in CANDIDATES if size <= 4}
    everywhere = best([1.0] * 16, gains, Steep(), found=1.0).nodes
    seldom = best([1.0] * 16, gains, Steep(), found=0.12).nodes
    assert sum(everywhere) <= 8 < sum(seldom)


def test_gains_that_come_in_lumps_are_evened_out() -> None:
    """A drafter of blocks: three drafts bring nothing, the fourth brings three."""
    assert steps_of({1: 0.0, 2: 0.0, 4: 3.0, 6: 3.0}) == [(0.75, 4, 0)]


def test_attempts_are_as_large_as_can_be_afforded() -> None:
    costs = Line(base=1.0, node=0.1)
    assert affordable((1, 2, 3, 4), 1, costs, credit=0.3) == 3
    assert affordable((1, 2, 3, 4), 1, costs, credit=0.05) == 0


def test_sizes() -> None:
    assert sizes_up_to(5) == (1, 2, 3, 4)
    assert sizes_up_to(0) == ()
    assert all(next_size(a) == b for a, b in pairwise(CANDIDATES))
    assert next_size(CANDIDATES[-1]) == CANDIDATES[-1]


def attempts(exploration: Exploration, slot: int, rounds: int) -> list[int]:
    """The rounds in which a request tries its drafter, which finds something each time."""
    found = []
    for turn in range(1, rounds + 1):
        if exploration.due(slot, hopeful=True):
            exploration.tried(slot, 0.0)
            found.append(turn)
    return found


def test_a_drafter_is_tried_again_ever_more_rarely() -> None:
    exploration = Exploration()
    exploration.began(0)
    tries = attempts(exploration, 0, 600)
    assert [b - a for a, b in pairwise([0, *tries])] == [16, 32, 64, 128, 128, 128]
    # another request may be of another kind; then it is as patient
    exploration.began(1)
    assert attempts(exploration, 1, 260) == [4, 132, 260]
    # drafts that pay make all of them try early again
    exploration.planned(0)
    exploration.began(2)
    assert [attempts(exploration, slot, 16) for slot in (0, 2)] == [[16], [16]]


def test_an_attempt_that_finds_nothing_to_draft_is_none() -> None:
    """A look-up without a match once doubled the wait."""
    exploration = Exploration()
    exploration.began(0)
    assert [exploration.due(0, hopeful=True) for _ in range(18)] == [False] * 15 + [True] * 3


def test_attempts_cost_a_hundredth_at_most() -> None:
    exploration = Exploration()
    start, spent = exploration.credit, 0.0
    for _ in range(1000):
        exploration.earned()
        if exploration.credit >= 0.4:
            exploration.began(0)
            exploration.tried(0, 0.4)
            spent += 0.4
    assert spent <= start + 0.01 * 1000


HALF = steps_of({size: 1 - 0.5**size for size in (1, 2, 3, 4)})


def test_a_request_is_measured_against_what_its_drafter_expects() -> None:
    model, rng, seen = AcceptanceModel(), random.Random(1), list[float]()
    model.began(0)
    assert model.hardness(0) == 1.0
    # right a quarter of the time where the drafter says a half: the square of it
    for _ in range(400):
        accepted = next((depth for depth in range(4) if rng.random() > 0.25), 4)
        model.observe(0, HALF, 4, accepted, expected=1 - 0.5**4)
        seen.append(model.hardness(0))
    assert sum(seen[100:]) / 300 == pytest.approx(2.0, rel=0.15)
    # what one request taught the next one knows, and it learns on by itself
    model.began(1)
    assert model.hardness(1) == pytest.approx(2.0, rel=0.3)
    for _ in range(3):
        model.observe(1, HALF, 4, accepted=4, expected=1 - 0.5**4)
    assert model.hardness(1) < model.hardness(0)
    model.release(1)
    model.began(1)
    assert model.hardness(1) > 1


def test_mixes_compare_what_was_promised_with_what_came() -> None:
    ratios = Ratios()
    ratios.began(0)
    assert ratios.ratio(0) == 1.0
    for _ in range(50):
        ratios.observe(0, accepted=1, expected=2.0)
    assert ratios.ratio(0) == pytest.approx(0.5, abs=0.03)
    ratios.began(1)
    ratios.observe(1, accepted=4, expected=2.0)
    assert ratios.ratio(0) < 0.55 < 1 < ratios.ratio(1)
    ratios.release(1)
    ratios.began(1)
    assert ratios.ratio(1) < 1


def test_requests_that_are_alike_teach_the_next_one_more() -> None:
    """Where requests do not differ, one bad round of a new one changes less."""
    changes = []
    for kinds in ((0.5,), (0.1, 0.9)):
        model, rng = AcceptanceModel(), random.Random(2)
        for request in range(60):
            model.began(request)
            for _ in range(20):
                rate = kinds[request % len(kinds)]
                accepted = next((depth for depth in range(4) if rng.random() > rate), 4)
                model.observe(request, HALF, 4, accepted, expected=1 - 0.5**4)
            model.release(request)
        model.began(99)
        before = model.hardness(99)
        for _ in range(2):
            model.observe(99, HALF, 4, 0, expected=1 - 0.5**4)
        changes.append(model.hardness(99) / before)
    assert 1 < changes[0] < changes[1]


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
    for turn in range(2000):
        drafts = (0, 2, 4)[turn % 3]
        step = 2.0 * (1 + drafts)
        model.observe(RoundTimes(0.25 * drafts, step, 1 + drafts, drafts, rest=0.5))
    assert model.round(1) == pytest.approx(2.5, rel=0.02)
    assert model.largest == 4
    assert model.round(5) + model.drafting(4) == pytest.approx(11.5, rel=0.05)
    assert model.round(3) + model.drafting(2) == pytest.approx(7.0, rel=0.05)


def test_one_disturbed_round_changes_little() -> None:
    model = CostModel(CostCurve({1: 1.0}))
    model.observe(RoundTimes(draft=0.0, step=1000.0, nodes=1))
    assert model.round(1) <= 1.5


def test_cold_rounds_and_a_shared_core_slow_drafts_and_plain_rounds_alike() -> None:
    """They once made every plain round look dear for twenty rounds, and drafts cheap."""
    model = CostModel(CostCurve({1: 1.0, 5: 1.4}))
    for turn in range(400):
        slow = 1.8 if turn % 100 > 50 else 1.0
        drafts = 4 if turn % 4 else 0
        step = model.curve(1 + drafts) * slow
        model.observe(RoundTimes(0.2 * slow if drafts else 0.0, step, 1 + drafts, drafts))
        if turn > 60:
            ratio = (model.round(5) + model.drafting(4)) / model.round(1)
            assert 1.4 <= ratio <= 1.9


def test_drafts_cost_the_same_after_a_long_context_as_after_a_short_one() -> None:
    """A cache that a step reads makes every round longer, and no draft dearer."""
    model = CostModel(CostCurve({1: 1.0, 5: 1.4}))
    for turn in range(600):
        drafts = 4 if turn % 3 else 0
        model.observe(RoundTimes(0.0, 2.0 + model.curve(1 + drafts), 1 + drafts, drafts))
    assert (model.round(5) + model.drafting(4)) / model.round(1) == pytest.approx(3.4 / 3, rel=0.05)


@pytest.mark.parametrize("reading", [0.001, 0.1], ids=["as-long", "bound-too-high"])
def test_a_long_cache_is_no_slow_machine(reading: float) -> None:
    """The first plain rounds behind it once made drafts of a small model seem as dear as the cache."""
    model = CostModel(CostCurve({1: 1.0, 5: 1.4}, reading))
    for _ in range(3):
        model.observe(RoundTimes(0.0, 1.0 + 5.0, 1, cached=5000))
    assert model.round(1) == pytest.approx(6.0, rel=0.02)
    assert model.round(5) / model.round(1) == pytest.approx((6.4 + 4 * 0.06 * 5) / 6.0, rel=0.02)
    # a short text between long ones says nothing about them
    for cached, step in ((50, 1.0), (50, 1.0), (5000, 6.0)):
        model.observe(RoundTimes(0.0, step, 1, cached=cached))
    assert model.round(1) == pytest.approx(6.0, rel=0.05)
    # and a short one is none, although the machine is slow
    slow = CostModel(CostCurve({1: 1.0, 5: 1.4}, 0.0001))
    for _ in range(3):
        slow.observe(RoundTimes(0.0, 1.5, 1, cached=100))
    assert slow.round(5) / slow.round(1) == pytest.approx(1.4, rel=0.02)


def test_the_curve_is_measured_by_the_clock_that_was_given() -> None:
    """Steps of a fake model take as long as a fake clock says: one second and a tenth for each node."""
    now, asked = [0.0], set[int]()

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
            nodes = len(inputs[0].tokens)
            if nodes < 20:
                asked.add(nodes)
            now[0] += 1.0 + 0.1 * nodes

    curve = measure(Fake(), clock=lambda: now[0])  # type: ignore[arg-type]
    # no step goes beyond the last position
    assert asked == {nodes for nodes in MEASURED_NODES if 20 + nodes <= 40}
    for nodes in range(1, 17):
        assert curve(nodes) == pytest.approx(1.0 + 0.1 * nodes, rel=0.08)


def test_a_first_draft_that_makes_its_weights_does_not_switch_drafting_off() -> None:
    """Heads once packed a quarter of a second long in their first round, and drafted no more."""
    model = CostModel(CostCurve({1: 1.0, 4: 1.2}))
    model.observe(RoundTimes(draft=0.0, step=1.0, nodes=1, rest=0.1))
    model.observe(RoundTimes(draft=80.0, step=5.0, nodes=4, drafts=3, rest=0.1))
    assert model.drafting(3) == 0.0
    model.observe(RoundTimes(draft=0.1, step=1.2, nodes=4, drafts=3, rest=0.1))
    assert model.drafting(3) == pytest.approx(0.1)


def test_second_drafts_that_still_make_their_weights_do_not_switch_drafting_off() -> None:
    """`self-pages` behind 32,000 tokens took 29 ms twice, 2 ms from then on, and drafted no more."""
    model = CostModel(CostCurve({1: 1.0, 4: 1.2}))
    model.observe(RoundTimes(draft=0.0, step=1.0, nodes=1))
    for draft in (80.0, 30.0):
        model.observe(RoundTimes(draft=draft, step=1.2, nodes=4, drafts=3))
        assert model.drafting(3) == 0.0
    model.observe(RoundTimes(draft=0.6, step=1.2, nodes=4, drafts=3))
    assert model.drafting(3) == pytest.approx(0.6, rel=0.1)
    # a third time it is what drafts cost
    dear = CostModel(CostCurve({1: 1.0, 4: 1.2}))
    dear.observe(RoundTimes(draft=0.0, step=1.0, nodes=1))
    for _ in range(3):
        dear.observe(RoundTimes(draft=30.0, step=1.2, nodes=4, drafts=3))
    assert dear.drafting(3) > 20


def test_a_draft_that_something_else_delayed_counts_at_most_twice() -> None:
    model = CostModel(CostCurve({1: 1.0, 4: 1.2}))
    model.observe(RoundTimes(draft=0.0, step=1.0, nodes=1, rest=0.0))
    for _ in range(9):
        model.observe(RoundTimes(draft=0.1, step=1.2, nodes=4, drafts=3, rest=0.0))
    model.observe(RoundTimes(draft=30.0, step=1.2, nodes=4, drafts=3, rest=0.0))
    assert model.drafting(3) < 0.14
