"""Greedy verification: the greedy decode, whatever is drafted."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.tree import chain, from_paths, root_only
from linspec.errors import ConfigError, InputError
from linspec.verifiers import VERIFIERS, GreedyVerifier, LosslessVerifier

PENALTIES = [
    {},
    {"repetition_penalty": 1.7},
    {"logit_bias": {0: 1.5, 3: -2.0}},
    {"repetition_penalty": 0.6, "logit_bias": {1: -float("inf")}},
]


def test_registry_lists_the_verifier_with_its_paper() -> None:
    entry = VERIFIERS.entry("greedy")
    assert entry.value is GreedyVerifier
    assert entry.paper and entry.facts["lossless"] == "yes"


@given(seed=st.integers(0, 10_000), nodes=st.integers(1, 24), kind=st.integers(0, 3))
@settings(max_examples=settings().max_examples * 3, deadline=None)
def test_path_is_the_greedy_decode_as_far_as_the_tree_goes(table_model, seed, nodes, kind) -> None:
    model, rng = table_model(seed=seed % 7), random.Random(seed)
    prompt = [rng.randrange(6) for _ in range(3)]
    tree = model.random_tree(rng, nodes, prompt[-1])
    params = SamplingParams(max_tokens=len(tree) + 1, **PENALTIES[kind])
    wanted = model.decode(params, prompt)
    sampler = Sampler(params, prompt, model.vocab_size)

    accepted = GreedyVerifier().accept(tree, model.logits(prompt, tree), sampler)

    emitted = accepted.emitted(tree)
    assert list(emitted) == wanted[: len(emitted)]
    assert accepted.path[0] == 0
    assert all(tree.parents[b] == a for a, b in zip(accepted.path, accepted.path[1:], strict=False))
    last = tree.children[accepted.path[-1]]
    assert accepted.token not in [tree.tokens[child] for child in last]


@given(seed=st.integers(0, 10_000), kind=st.integers(0, 3))
@settings(max_examples=settings().max_examples * 25 // 20, deadline=None)
def test_whole_generations_equal_plain_decoding(table_model, seed, kind) -> None:
    model, rng = table_model(seed=seed % 5), random.Random(seed)
    prompt = [rng.randrange(6) for _ in range(2)]
    params = SamplingParams(max_tokens=25, **PENALTIES[kind])
    for verifier in (GreedyVerifier(), LosslessVerifier()):
        output, _ = model.generate(
            verifier, params, prompt, lambda h: model.random_tree(rng, rng.randint(1, 12), h[-1])
        )
        assert output == model.decode(params, prompt)


def test_a_perfect_chain_saves_rounds(table_model) -> None:
    model, params = table_model(), SamplingParams(max_tokens=20)
    wanted = model.decode(params, [0, 1])

    def oracle(history: list[int]):
        return chain([history[-1], *wanted[len(history) - 2 :][:4]])

    output, rounds = model.generate(GreedyVerifier(), params, [0, 1], oracle)
    assert output == wanted
    assert rounds == 4


def test_penalty_counts_the_draft_tokens_on_the_path() -> None:
    # after token 1 has been accepted, its penalized score falls behind that of token 2
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.5], [0.0, 0.0, 1.0]])
    tree = chain([0, 1, 1])
    penalized = Sampler(SamplingParams(repetition_penalty=2.0), [0], 3)
    accepted = GreedyVerifier().accept(tree, logits, penalized)
    assert (accepted.path, accepted.token) == ((0, 1), 2)
    plain = Sampler(SamplingParams(), [0], 3)
    assert GreedyVerifier().accept(tree, logits, plain).path == (0, 1, 2)


def test_ties_take_the_first_token_with_and_without_the_fast_path() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    tree = chain([0, 1])
    for params in (SamplingParams(), SamplingParams(logit_bias={0: 0.0})):
        accepted = GreedyVerifier().accept(tree, logits, Sampler(params, [0], 3))
        assert (accepted.path, accepted.token) == ((0, 1), 0)


def test_logprobs_are_the_models_own(table_model) -> None:
    model = table_model()
    tree = from_paths(1, [(a, b) for a in range(6) for b in range(6)])
    logits = model.logits([0, 1], tree)
    params = SamplingParams(logprobs=2, repetition_penalty=1.3, logit_bias={2: 1.0})
    accepted = GreedyVerifier().accept(tree, logits, Sampler(params, [0, 1], 6))

    expected = logits.double().log_softmax(-1)
    assert accepted.logprobs is not None
    assert [entry.token for entry in accepted.logprobs] == list(accepted.emitted(tree))
    for node, entry in zip(accepted.path, accepted.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(expected[node, entry.token]), abs=1e-5)
        best = expected[node].topk(2)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(("asked", "given_back"), [(0, 0), (3, 3), (50, 6)])
def test_logprobs_list_as_many_alternatives_as_there_are(table_model, asked, given_back) -> None:
    model, tree = table_model(), root_only(1)
    sampler = Sampler(SamplingParams(logprobs=asked), [0, 1], 6)
    (entry,) = GreedyVerifier().accept(tree, model.logits([0, 1], tree), sampler).logprobs
    assert len(entry.top) == given_back


def test_no_logprobs_unless_asked() -> None:
    sampler = Sampler(SamplingParams(), [0], 3)
    assert GreedyVerifier().accept(root_only(0), torch.eye(3)[:1], sampler).logprobs is None


def test_refuses_to_sample() -> None:
    sampler = Sampler(SamplingParams(temperature=0.7), [0], 3)
    with pytest.raises(ConfigError, match=r"temperature 0\.7.*lossless"):
        GreedyVerifier().accept(root_only(0), torch.zeros(1, 3), sampler)


def test_logits_of_another_tree_are_refused() -> None:
    with pytest.raises(InputError, match=r"tree of 2 nodes.*\[3, 3\]"):
        GreedyVerifier().accept(chain([0, 1]), torch.eye(3), Sampler(SamplingParams(), [0], 3))
