"""Sampling: settings are checked, warping is that of transformers, draws follow the distribution."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.errors import ConfigError, InputError

VOCAB = 40


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-9),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: math.inf}),
        ("stop", ""),
        ("stop", ("end", "")),
        ("stop", (3,)),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
    ],
)
def test_a_broken_rule_is_named_with_its_setting(setting, value) -> None:
    with pytest.raises(ConfigError, match=setting):
        SamplingParams(**{setting: value})


def test_stop_accepts_one_string() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_params_are_values() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias, seed=2**64 - 1)
    bias[1] = 5.0
    assert params.logit_bias == {1: 2.0}
    assert params == pickle.loads(pickle.dumps(params))
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}, seed=2**64 - 1))
    Sampler(params, (), VOCAB)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_the_vocabulary_are_refused(token) -> None:
    with pytest.raises(InputError, match=f"logit_bias names token {token}.* {VOCAB} tokens"):
        Sampler(SamplingParams(logit_bias={token: 1.0}), (), VOCAB)
    with pytest.raises(InputError, match=f"prompt.*{token}"):
        Sampler(SamplingParams(), [0, token], VOCAB)


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.05, 1.0),
    penalty=st.floats(0.5, 2.0),
    history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    split=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
@settings(max_examples=settings().max_examples * 150 // 20, deadline=None)
def test_warping_equals_transformers(
    seed, temperature, top_k, top_p, penalty, history, split
) -> None:
    logits = random_logits(seed)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    processors.append(TopPLogitsWarper(top_p))
    expected = processors(torch.tensor([history]), logits[None].clone())[0].softmax(-1)

    prompt_end, output_end = sorted(split)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
    )
    sampler = Sampler(params, history[:prompt_end], VOCAB)
    sampler.observe(history[prompt_end:output_end])
    probabilities = sampler.probabilities(logits, history[output_end:])
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)


def test_penalty_of_extra_tokens_is_not_remembered() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0], 3)
    logits = torch.tensor([2.0, 2.0, -2.0])
    assert sampler.scores(logits, [2]).tolist() == [1.0, 2.0, -4.0]
    assert sampler.scores(logits).tolist() == [1.0, 2.0, -2.0]
    sampler.observe([1])
    assert sampler.scores(logits).tolist() == [1.0, 1.0, -2.0]


def test_bias_is_added_after_the_penalty_and_can_ban() -> None:
    params = SamplingParams(
        temperature=1.0, repetition_penalty=2.0, logit_bias={0: 1.0, 2: -math.inf}
    )
    sampler = Sampler(params, [0], 3)
    assert sampler.scores(torch.tensor([2.0, 2.0, 9.0])).tolist() == [2.0, 2.0, -math.inf]
    assert sampler.probabilities(torch.tensor([2.0, 2.0, 9.0])).tolist() == [0.5, 0.5, 0.0]


def test_scores_do_not_change_the_logits() -> None:
    logits = random_logits(0)
    before = logits.clone()
    params = SamplingParams(
        temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0, logit_bias={1: 3.0}
    )
    Sampler(params, [0, 1], VOCAB).probabilities(logits, [2])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({}, True),
        ({"temperature": 1.0}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logit_bias": {0: 1.0}}, False),
    ],
)
def test_plain_means_that_raw_logits_decide(params, plain) -> None:
    assert Sampler(SamplingParams(**params), (), VOCAB).plain is plain


def test_temperature_zero_is_a_point_mass() -> None:
    probabilities = Sampler(SamplingParams(), (), 3).probabilities(torch.tensor([1.0, 4.0, 4.0]))
    assert probabilities.tolist() == [0.0, 1.0, 0.0]


def test_the_lowest_temperature_is_nearly_greedy_and_finite() -> None:
    sampler = Sampler(SamplingParams(temperature=1e-6), (), 3)
    assert sampler.probabilities(torch.tensor([-9e4, 9e4, 5.0])).tolist() == [0.0, 1.0, 0.0]


def test_half_precision_logits_are_warped_in_float32() -> None:
    sampler = Sampler(SamplingParams(temperature=0.7, top_p=0.9), (), VOCAB)
    logits = random_logits(1).bfloat16()
    probabilities = sampler.probabilities(logits)
    assert probabilities.dtype == torch.float32
    assert torch.equal(probabilities, sampler.probabilities(logits.float()))


@given(weights=st.lists(st.integers(0, 3), min_size=1, max_size=30).filter(any))
@settings(max_examples=settings().max_examples * 5, deadline=None)
def test_draws_never_have_probability_zero(weights) -> None:
    p = torch.tensor(weights).float()
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), (), len(weights))
    assert all(weights[sampler.draw(p / p.sum())] for _ in range(20))


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_the_extreme_uniforms_draw_the_extreme_tokens(monkeypatch, edge) -> None:
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0, 0.0])
    sampler = Sampler(SamplingParams(temperature=1.0), (), 6)
    monkeypatch.setattr(sampler, "uniform", lambda: edge)
    assert sampler.draw(p) == (1 if edge == 0 else 3)


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.1, 0.2, 0.0, 0.7])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=8), (), 4)
    drawn = torch.tensor([sampler.draw(p) for _ in range(5000)])
    assert torch.allclose(drawn.bincount(minlength=4) / 5000, p, atol=0.02)


@pytest.mark.parametrize("bad", [[math.nan, 0.5], [0.0, 0.0]])
def test_no_token_is_drawn_from_nothing(bad) -> None:
    with pytest.raises(InputError, match="cannot draw"):
        Sampler(SamplingParams(temperature=1.0), (), 2).draw(torch.tensor(bad))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banning_every_token_is_named(temperature: float) -> None:
    """Greedy once took token 0."""
    bans = {0: -math.inf, 1: -math.inf}
    sampler = Sampler(SamplingParams(temperature=temperature, logit_bias=bans), (), 2)
    for banned in (sampler.scores, sampler.probabilities):
        with pytest.raises(InputError, match="nothing is allowed"):
            banned(torch.zeros(2))
    one = Sampler(SamplingParams(temperature=temperature, logit_bias={0: -math.inf}), (), 2)
    assert one.draw(one.probabilities(torch.zeros(2))) == 1


def test_seeds_decide_the_uniforms_and_nothing_global_does() -> None:
    def uniforms(seed: int | None) -> list[float]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), (), 2)
        return [sampler.uniform() for _ in range(5)]

    state = torch.random.get_rng_state()
    assert uniforms(3) == uniforms(3) != uniforms(4)
    assert uniforms(None) != uniforms(None)
    assert all(0 <= u < 1 for u in uniforms(None))
    assert torch.equal(state, torch.random.get_rng_state())
