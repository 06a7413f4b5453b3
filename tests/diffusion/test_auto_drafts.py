"""Drafts by what they cost: the output without them whatever is decided, and none where none pay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from denoisers import PROMPTS, make
from plain_diffusion import CONFIGS
from test_freedave import LONG, assert_same

from linspec import SamplingParams
from linspec.diffusion import StepCost
from linspec.diffusion.auto_drafts import AutoDrafts, AutoDraftsOptions
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.forward_costs import ForwardCosts
from linspec.engine.loops.masked_diffusion import MaskedDiffusionLoop
from linspec.errors import ConfigError

SPEC = "block=fixed:8,commit=static,cache=dual"


def told(*seconds: float, sequences: int = 1) -> AutoDrafts:
    """A policy that knows what one canvas of 8 rows more costs beside one of each sequence, and so on."""
    policy = AutoDrafts(AutoDraftsOptions())
    for more, each in enumerate((1.0, *seconds)):
        for _ in range(3):
            policy.observe(StepCost(sequences, 8 * (sequences + more), each))
    return policy


@pytest.mark.parametrize("heat", [0.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_is_decided_the_output_is_that_without_drafts(
    monkeypatch: pytest.MonkeyPatch, name: str, heat: float
) -> None:
    rng = random.Random(name)
    params = SamplingParams(max_tokens=19, temperature=heat, seed=7, ignore_eos=True)
    monkeypatch.setattr(AutoDrafts, "tries", lambda *given: rng.random() < 0.8)
    assert assert_same(monkeypatch, name, SPEC, "auto", params) > 0


@pytest.mark.parametrize(("second", "sure", "tried"), [(1.5, 0.7, True), (1.5, 0.4, False)])
def test_a_draft_pays_that_is_likelier_than_what_it_costs_more(
    second: float, sure: float, tried: bool
) -> None:
    policy = told(second)
    assert policy.tries([sure], 8) is tried
    assert policy.price == second


def asked(policy: AutoDrafts, sure: float, steps: int) -> list[int]:
    """The steps in which such a draft is computed along, where it costs as much as its canvas of 8 rows."""
    canvas, found = Canvas([1], 8, mask_id=9), list[int]()
    for step in range(steps):
        if policy.ahead(canvas) and policy.tries([sure], 8) and policy.tries([sure], 8):
            found.append(step)
            policy.judged([sure], 1)
            policy.observe(StepCost(1, 16, 2.0))
        else:
            policy.observe(StepCost(1, 8, 1.0))
    return found


def test_what_costs_as_much_as_a_forward_is_never_drafted_but_to_see_whether_it_still_does() -> (
    None
):
    found = asked(told(2.0), 1.0, 2000)
    assert 6 <= len(found) <= 8 and min(b - a for a, b in pairwise(found)) >= 256


def test_what_can_never_pay_is_not_asked_about_each_time() -> None:
    policy, canvas = told(2.0), Canvas([1], 8, mask_id=9)
    assert not policy.tries([1.0], 8)
    assert [policy.ahead(canvas) for _ in range(34)] == [0] * 32 + [3, 3]
    assert not told(1.8).tries([0.1], 8) and told(1.8).ahead(canvas) == 3


def test_nothing_is_asked_about_before_anything_would_be_tried() -> None:
    policy, canvas = told(), Canvas([1], 8, mask_id=9)
    assert policy.ahead(canvas) and not policy.tries([1.0], 8)
    # what plain forwards cost is looked at once more ahead of that
    found = [(policy.ahead(canvas), policy.observes) for _ in range(64)]
    assert found == [(0, False)] * 58 + [(0, True)] * 5 + [(3, True)]
    assert policy.tries([1.0], 8)


def test_a_second_draft_pays_by_both() -> None:
    for third, tried in ((1.8, True), (2.6, False)):
        policy = told(1.5, third)
        assert policy.tries([0.9], 8) and policy.tries([0.9, 0.8], 8) is tried


def test_in_company_a_step_pays_in_which_all_have_drafts() -> None:
    """One draft in a step of four sequences says by a line what four of them cost."""
    assert told(1.1, sequences=4).tries([0.7], 8)
    assert not told(1.2, sequences=4).tries([0.7], 8)


def test_sizes_that_were_not_seen_are_tried_with_likely_drafts_and_seldom() -> None:
    found = asked(AutoDrafts(AutoDraftsOptions()), 0.8, 220)
    assert len(found) == 3 and found[0] >= 63 and min(b - a for a, b in pairwise(found)) >= 64
    assert not asked(AutoDrafts(AutoDraftsOptions()), 0.4, 220)


def test_what_was_too_dear_is_tried_again_at_times() -> None:
    assert 3 <= len(asked(told(1.9), 0.7, 1100)) <= 4
    assert not asked(told(1.9), 0.3, 1100)


def test_chances_are_those_that_came_true() -> None:
    policy = told(1.5)
    assert policy.tries([0.7], 8)
    for _ in range(100):
        policy.judged([0.7], 0)
    assert not policy.tries([0.7], 8)
    for _ in range(400):
        policy.judged([0.5, 0.4], 2)
    assert policy.tries([0.5], 8)


def test_costs_are_those_of_quick_forwards_of_like_sizes() -> None:
    costs = ForwardCosts()
    for positions, seconds in ((8, 7.0), (9, 9.0), (8, 1.2)):
        assert costs(8) is None
        costs.observe(positions, seconds)
    assert costs(8) == costs(9) == 1.2 and costs(32) is None
    for seconds in range(2, 17):
        costs.observe(8, float(seconds))
    assert costs(8) == 5.0


def test_costs_of_other_sizes_lie_on_lines() -> None:
    costs = ForwardCosts()
    for positions, seconds in ((8, 1.0), (16, 2.0), (64, 4.0)):
        for _ in range(3):
            costs.observe(positions, seconds)
    assert costs(32) == pytest.approx(2 + 2 / 3)
    assert costs(120) == pytest.approx(4 + 3 * 56 / 56)
    assert costs(2) == pytest.approx(1 - 3 * 6 / 56)


def test_a_line_says_what_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StepCost] = []
    monkeypatch.setattr(AutoDrafts, "observe", lambda self, cost: seen.append(cost))
    (plain,) = make("llada", f"{SPEC},verify=auto").generate(PROMPTS[:1], LONG)
    assert plain.stats.decision == "verify=auto: no drafts in 19 rounds"
    # three blocks, whose first forwards are of another kind
    assert len(seen) == 16 and {each.sequences for each in seen} == {1}
    assert all(each.seconds > 0 and each.positions in (8, 3) for each in seen)
    monkeypatch.setattr(AutoDrafts, "tries", lambda *given: True)
    monkeypatch.setattr(AutoDrafts, "price", 1.5)
    (found,) = make("llada", f"{SPEC},verify=auto").generate(PROMPTS[:1], LONG)
    assert "verify=auto: drafts in" in found.stats.decision
    assert found.stats.decision.endswith("one with drafts costs 1.50 plain ones")
    assert max(each.positions for each in seen) > 8
    assert "decision" in found.to_json()


def test_steps_that_failed_say_nothing_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = MaskedDiffusionLoop._step, list[StepCost]()

    def step(self: Any, forwards: Sequence[Any]) -> Any:
        if len(forwards) > 1:
            raise RuntimeError("one at a time")
        return plain(self, forwards)

    monkeypatch.setattr(MaskedDiffusionLoop, "_step", step)
    monkeypatch.setattr(AutoDrafts, "observe", lambda self, cost: seen.append(cost))
    results = make("llada", f"{SPEC},verify=auto", max_batch=2).generate(PROMPTS[:2], LONG)
    assert all(len(each.token_ids) == 19 for each in results)
    assert all(each.seconds > 0 for each in seen)


def test_how_many_at_most_is_checked() -> None:
    with pytest.raises(ConfigError, match="most must be 1 or more"):
        make(spec="verify=auto:0")
    assert make(spec="verify=auto:3").engine.loop.copies == 2  # type: ignore[attr-defined]  # of this loop


def test_no_number_is_drawn_for_drafts_that_are_too_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn is bounded by the likeliest token, so that nothing is drawn in vain."""
    bounds: list[float] = []

    def tries(self: AutoDrafts, sures: Sequence[float], rows: int) -> bool:
        bounds.append(sures[-1])
        return False

    monkeypatch.setattr(AutoDrafts, "tries", tries)
    params = SamplingParams(max_tokens=19, temperature=0.7, seed=7, ignore_eos=True)
    make("llada", f"{SPEC},verify=auto").generate(PROMPTS[:1], params)
    assert len(bounds) == 16 and 0 < max(bounds) < 1
