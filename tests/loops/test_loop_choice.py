"""A policy is read by the loop of the model: `commit=…` by that of a diffusion model, drafts by others."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from checkpoints import model_dir
from denoisers import PROMPTS, WHOLE, make, talker, tokens
from plain_diffusion import CONFIGS
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.cli import app
from linspec.diffusion.kinds import kinds
from linspec.engine.loops.masked_diffusion import AUTO
from linspec.errors import ConfigError, WrongType
from linspec.policies.fixed import Fixed

SPECS = (
    "commit=threshold:0.3,cache=dual",
    "block=fixed:5,commit=local-leap:sure=0.3+near=0.1,stop=never",
    "block=fixed:5,commit=draft-and-edit:least=0.25+keep=0.2,cache=prefix",
    "masks=8",
)


def texts(llm: LLM, params: SamplingParams = WHOLE) -> list[Any]:
    found = llm.generate(PROMPTS, params)
    return [(each.token_ids, each.stats.rounds, each.stats.computed) for each in found]


@pytest.mark.crossed(2)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_policy_says_what_a_loop_says(name: str, spec: str) -> None:
    heat = SamplingParams(max_tokens=13, temperature=0.8, seed=4, ignore_eos=True)
    for params in (WHOLE, heat):
        expected = texts(make(name, spec), params)
        assert texts(make(name, policy=spec), params) == expected
        for loop in ("auto", "masked-diffusion"):
            made = LLM(make(name).model, tokenizer=make(name).tokenizer, loop=loop, policy=spec)
            assert texts(made, params) == expected


@pytest.mark.crossed(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_auto_is_the_documented_combination(name: str) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    assert texts(make(name), params) == texts(make(name, AUTO), params)
    assert texts(make(name, policy="auto"), params) == texts(make(name, AUTO), params)
    # what a loop says is not overruled
    assert tokens(name, "commit=static")[1] == [13] * len(PROMPTS)


@pytest.mark.parametrize("policy", ["12", 3, "goodput", "fixed:nodes=2", Fixed(2)])
def test_what_plans_drafts_is_refused_for_a_diffusion_model(policy: Any) -> None:
    with pytest.raises(ConfigError, match="plans drafts, and a diffusion model takes none; give"):
        make(policy=policy)


@pytest.mark.parametrize("model", [partial(LLM, talker()), make], ids=["path", "loaded"])
def test_an_unknown_policy_of_a_diffusion_model_named_those_of_others(
    model: Callable[..., LLM],
) -> None:
    with pytest.raises(ConfigError) as error:
        model(policy="nonsense")
    said = str(error.value)
    assert "specdec-pp" not in said and "draft nodes" not in said
    for kind, registry in kinds().items():
        assert f"{kind}={'|'.join(registry.names())}" in said


def test_what_a_diffusion_loop_reads_is_refused_for_other_models() -> None:
    for drafter in ("none", "prompt-lookup"):
        with pytest.raises(ConfigError, match="loop of a diffusion model, and this is none"):
            LLM(model_dir("softmax"), drafter=drafter, policy=SPECS[0])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("commit=treshold", "did you mean 'threshold'"),
        ("commit=threshold:0", "least must be above 0 and at most 1, got 0"),
        ("comit=threshold", "has no option 'comit'.*did you mean 'commit'"),
        ("masks=0", "masks must be 1 or more"),
        ("threshold:0.9", "none of a diffusion model.*did you mean 'commit=threshold:0.9'"),
        ("cache=dual,cache=none", "cache is given twice"),
    ],
)
def test_what_a_policy_may_not_say_is_named(policy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(policy=policy)


def test_two_places_that_say_how_to_decode_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="both say how to decode"):
        make(spec="commit=static", policy=SPECS[0])
    with pytest.raises(WrongType, match="a loop is a spec"):
        LLM(model_dir("softmax"), loop=3)  # type: ignore[arg-type]


def test_the_verbs_take_it_too() -> None:
    spec = "block=fixed:8,commit=threshold:0.2,cache=dual"
    expected = LLM(talker(), policy=spec).generate("abcd", SamplingParams(max_tokens=12))[0]
    given = ["generate", str(talker()), "--policy", spec, "--max-tokens", "12", "--prompt", "abcd"]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["token_ids"] == list(expected.token_ids)
    assert said["computed"] == expected.stats.computed
    given[3] = "12"
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1 and "plans drafts" in result.output
