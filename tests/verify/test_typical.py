"""Typical acceptance: the threshold, the choice among paths, and that it is lossy."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.tree import chain, from_paths
from linspec.errors import ConfigError
from linspec.verifiers import VERIFIERS, GreedyVerifier, TypicalOptions, TypicalVerifier

SAMPLED = SamplingParams(temperature=1.0, seed=0)


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_registered_as_lossy() -> None:
    assert VERIFIERS["typical"] is TypicalVerifier
    assert VERIFIERS.entry("typical").facts["lossless"] == "no"
    assert not TypicalVerifier.lossless


def test_threshold_is_epsilon_when_sure_and_falls_with_entropy() -> None:
    verifier = TypicalVerifier()
    assert verifier.threshold(torch.tensor([1.0, 0.0])) == pytest.approx(0.09)
    uniform = torch.full((100,), 0.01)
    assert verifier.threshold(uniform) == pytest.approx(0.3 / 100, rel=1e-4)


@given(seed=st.integers(0, 10_000), nodes=st.integers(1, 20))
@settings(max_examples=settings().max_examples * 50 // 20, deadline=None)
def test_path_is_the_deepest_plausible_one(table_model, seed, nodes) -> None:
    model, rng = table_model(seed=seed % 7), random.Random(seed)
    tree = model.random_tree(rng, nodes, 1)
    logits = model.logits([0, 1], tree)
    p = logits.softmax(-1).double()
    entropy = -(p * p.log()).sum(-1)
    threshold = torch.minimum(torch.tensor(0.09), 0.3 * (-entropy).exp())

    def chances(node: int) -> list[tuple[int, float]]:
        path = tree.path_to(node)
        edges = itertools.pairwise(path)
        return [(a, float(p[a, tree.tokens[b]])) for a, b in edges]

    plausible = {
        node: math.prod(chance for _, chance in chances(node))
        for node in range(len(tree))
        if all(chance > threshold[a] for a, chance in chances(node))
    }
    accepted = TypicalVerifier().accept(tree, logits, Sampler(SAMPLED, [0, 1], 6))

    last = accepted.path[-1]
    assert accepted.path == tree.path_to(last)
    assert last in plausible
    assert tree.depths[last] == max(tree.depths[node] for node in plausible)
    rivals = [node for node in plausible if tree.depths[node] == tree.depths[last]]
    assert plausible[last] == pytest.approx(max(plausible[node] for node in rivals))


def test_the_likelier_of_two_equally_deep_paths_wins() -> None:
    tree = from_paths(0, [(1,), (2,)])
    row = [0.1, 0.4, 0.5]
    accepted = TypicalVerifier().accept(tree, logits_of(row, row, row), Sampler(SAMPLED, [0], 3))
    assert accepted.path == (0, 2)


def test_a_deeper_path_beats_a_likelier_one() -> None:
    tree = from_paths(0, [(2,), (1, 1)])
    logits = logits_of([0.1, 0.4, 0.5], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1])
    accepted = TypicalVerifier().accept(tree, logits, Sampler(SAMPLED, [0], 3))
    assert accepted.path == (0, 2, 3)


def test_the_root_is_kept_when_no_draft_is_plausible() -> None:
    logits = logits_of([0.98, 0.01, 0.01], [0.2, 0.4, 0.4])
    accepted = TypicalVerifier().accept(chain([0, 1]), logits, Sampler(SAMPLED, [0], 3))
    assert accepted.path == (0,)


def test_bonus_token_is_drawn_from_the_last_node() -> None:
    tree, logits = chain([0, 1]), logits_of([0.1, 0.8, 0.1], [0.0, 0.3, 0.7])
    sampler = Sampler(SAMPLED, [0], 3)
    drawn = [TypicalVerifier().accept(tree, logits, sampler).token for _ in range(500)]
    assert 0 not in drawn
    assert 0.6 < drawn.count(2) / 500 < 0.8


def test_penalty_counts_the_draft_tokens_on_the_path() -> None:
    # 0.2 passes the threshold until the penalty for a second token 1 makes it implausible
    row = [4.0, 3.0, 0.0]
    params = SamplingParams(temperature=1.0, repetition_penalty=4.0, seed=0)
    tree, logits = chain([2, 1, 1]), torch.tensor([row, row, row])
    assert TypicalVerifier().accept(tree, logits, Sampler(SAMPLED, [2], 3)).path == (0, 1, 2)
    assert TypicalVerifier().accept(tree, logits, Sampler(params, [2], 3)).path == (0, 1)


def test_warping_decides_what_is_plausible() -> None:
    tree, logits = chain([0, 1]), logits_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    only_best = SamplingParams(temperature=1.0, top_k=1, seed=0)
    accepted = TypicalVerifier().accept(tree, logits, Sampler(only_best, [0], 3))
    assert (accepted.path, accepted.token) == ((0,), 0)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=settings().max_examples * 30 // 20, deadline=None)
def test_temperature_zero_is_the_greedy_rule(table_model, seed) -> None:
    model, rng = table_model(seed=seed % 7), random.Random(seed)
    tree = model.random_tree(rng, 15, 1)
    logits = model.logits([0, 1], tree)
    greedy = GreedyVerifier().accept(tree, logits, Sampler(SamplingParams(), [0, 1], 6))
    typical = TypicalVerifier().accept(tree, logits, Sampler(SamplingParams(), [0, 1], 6))
    assert typical == greedy


@pytest.mark.parametrize("setting", [{"epsilon": 0.0}, {"delta": 1.0}, {"delta": float("nan")}])
def test_thresholds_outside_their_range_are_refused(setting) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        TypicalOptions(**setting)
