"""The policy for whoever names none suits the drafter."""

from __future__ import annotations

import pytest
from checkpoints import model_dir

from linspec import LLM, SamplingParams
from linspec.policies.auto import Auto
from linspec.policies.base import Policy
from linspec.policies.costs import CostCurve
from linspec.policies.goodput import Goodput
from linspec.policies.specdec_pp import SpecDecPP

CHEAP = CostCurve({1: 1e-3, 64: 1.2e-3})


@pytest.mark.parametrize(
    ("drafter", "kind"),
    [
        ("suffix", SpecDecPP),
        ("prompt-lookup", SpecDecPP),
        ("prompt-lookup+draft-model:{model}", SpecDecPP),
        ("draft-model:{model}", Goodput),
    ],
)
def test_drafters_that_say_how_sure_they_are_are_cut_by_it(
    drafter: str, kind: type[Policy]
) -> None:
    policy, params = Auto(CHEAP), SamplingParams(max_tokens=24)
    prompts = ["abcd abcd abcd", "the end"]
    plain = [each.token_ids for each in LLM(model_dir("aug")).generate(prompts, params)]
    drafter = drafter.format(model=model_dir("aug"))
    llm = LLM(model_dir("aug"), drafter=drafter, policy=policy, max_batch=2)
    assert [each.token_ids for each in llm.generate(prompts, params)] == plain
    assert type(policy._chosen) is kind
