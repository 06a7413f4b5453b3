"""Lossless verification: the output's joint distribution is the target's, whatever is drafted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.tree import TokenTree, chain, root_only
from linspec.errors import DrafterError, NotFinite
from linspec.verifiers import LosslessVerifier, lossless

TRIALS = 20_000
PROMPT = (0, 1)


class CachedSampler(Sampler):
    """The warping of the few rows of a table model, computed once: thousands of trials repeat it."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        super().__init__(params, (), vocab_size)
        self._cache: dict[tuple[float, ...], Tensor] = {}

    def probabilities(self, logits: Tensor, extra: Sequence[int] = ()) -> Tensor:
        key = tuple(logits.tolist())
        if key not in self._cache:
            self._cache[key] = super().probabilities(logits)
        return self._cache[key]


class SamplingDrafter:
    """Draws `width` children without replacement at every node of the first `depth` levels."""

    def __init__(self, proposals: Tensor, width: int, depth: int, seed: int = 5) -> None:
        self.rng = random.Random(seed)
        self.width, self.depth = width, depth
        self.rows = {
            (a, b): (proposals[a, b].clone(), proposals[a, b].tolist())
            for a in range(len(proposals))
            for b in range(len(proposals))
        }

    def propose(self, before: int, root: int) -> TokenTree:
        tokens, parents, sampled = [root], [-1], {}
        level = [(0, before)]
        for _ in range(self.depth):
            following = []
            for node, previous in level:
                q, weights = self.rows[previous, tokens[node]]
                sampled[node] = q
                for token in self._draws(weights):
                    following.append((len(tokens), tokens[node]))
                    parents.append(node)
                    tokens.append(token)
            level = following
        return TokenTree(tuple(tokens), tuple(parents), sampled)

    def _draws(self, weights: list[float]) -> list[int]:
        left = list(weights)
        found = []
        while len(found) < self.width and any(left):
            (token,) = self.rng.choices(range(len(left)), left)
            left[token] = 0.0
            found.append(token)
        return found


def emitted_triples(model, params: SamplingParams, propose, trials: int) -> Counter:
    """How often each of the first three tokens came out, over independent generations."""
    sampler, verifier = CachedSampler(params, model.vocab_size), LosslessVerifier()
    counts: Counter = Counter()
    for _ in range(trials):
        history = list(PROMPT)
        while len(history) < len(PROMPT) + 3:
            tree = propose(history) if len(history) == len(PROMPT) else root_only(history[-1])
            logits = model.logits(history, tree)
            history += verifier.accept(tree, logits, sampler).emitted(tree)
        counts[tuple(history[2:5])] += 1
    return counts


def p_value(model, params: SamplingParams, counts: Counter) -> float:
    """Chi-square of the counts against the exact joint; rare cells are one cell."""
    p = model.distributions(params).double()
    a, b = PROMPT
    joint = torch.einsum("x,xy,xyz->xyz", p[a, b], p[b], p)
    joint = joint / joint.sum() * counts.total()
    observed = torch.zeros_like(joint)
    for triple, count in counts.items():
        observed[triple] = count
    assert not observed[joint == 0].any(), "a token of probability 0 was emitted"
    rare = joint < 5
    cells = [(observed[~rare], joint[~rare])]
    if float(joint[rare].sum()) >= 5:
        cells.append((observed[rare].sum()[None], joint[rare].sum()[None]))
    else:
        cells[0][1].mul_(float(observed[~rare].sum() / joint[~rare].sum()))
    seen, expected = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return float(chisquare(seen.numpy(), expected.numpy()).pvalue)


@pytest.mark.crossed(4)
@pytest.mark.parametrize(
    ("warp", "width", "depth"),
    [
        ({"temperature": 1.0}, 1, 2),
        ({"temperature": 1.5}, 3, 1),
        ({"temperature": 1.3, "top_k": 4}, 2, 2),
        ({"temperature": 1.0, "top_p": 0.8}, 5, 1),
    ],
)
def test_sampled_drafts_keep_the_joint_distribution(table_model, warp, width, depth) -> None:
    model = table_model(vocab_size=5)
    params = SamplingParams(seed=11, **warp)
    # proposals are those of another model with its own warping, so neither support holds the other
    proposals = table_model(vocab_size=5, seed=9).distributions(
        SamplingParams(temperature=0.9, top_k=0 if depth == 1 else 4)
    )
    drafter = SamplingDrafter(proposals, width, depth)
    counts = emitted_triples(model, params, lambda h: drafter.propose(h[-2], h[-1]), TRIALS)
    assert p_value(model, params, counts) > 1e-4


def test_certain_drafts_keep_the_joint_distribution(table_model) -> None:
    model, rng = table_model(vocab_size=5), random.Random(3)
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=4)
    trees = [model.random_tree(rng, 9, PROMPT[-1]) for _ in range(20)]
    counts = emitted_triples(model, params, lambda h: rng.choice(trees), TRIALS)
    assert p_value(model, params, counts) > 1e-4


def test_children_beyond_the_support_of_the_proposal_count_as_certain(table_model) -> None:
    model = table_model(vocab_size=5)
    params = SamplingParams(temperature=1.0, seed=2)
    proposals = table_model(vocab_size=5, seed=9).distributions(
        SamplingParams(temperature=1.0, top_k=2)
    )
    drafter = SamplingDrafter(proposals, width=2, depth=1)

    def propose(history: list[int]) -> TokenTree:
        tree = drafter.propose(history[-2], history[-1])
        others = [token for token in range(5) if token not in tree.tokens[1:]]
        return TokenTree((*tree.tokens, *others[:2]), (*tree.parents, 0, 0), tree.proposals)

    counts = emitted_triples(model, params, propose, TRIALS)
    assert p_value(model, params, counts) > 1e-4


@pytest.mark.crossed(2)
@pytest.mark.parametrize("sampled", [False, True], ids=["certain", "sampled"])
def test_cutting_drafts_by_their_tokens_is_exact_for_certain_ones_alone(
    table_model, sampled: bool
) -> None:
    """Why a policy is not asked about sampled drafts: see `Verifier`."""
    model = table_model(vocab_size=5)
    proposals = table_model(vocab_size=5, seed=9).distributions(SamplingParams(temperature=0.9))
    drafter = SamplingDrafter(proposals, width=1, depth=1)

    def propose(history: list[int]) -> TokenTree:
        tree = drafter.propose(history[-2], history[-1])
        tree = tree if sampled else TokenTree(tree.tokens, tree.parents)
        return tree if tree.tokens[1] < 2 else tree.first(1)

    counts = emitted_triples(model, SamplingParams(temperature=1.5, seed=11), propose, 8_000)
    p = p_value(model, SamplingParams(temperature=1.5), counts)
    assert p < 1e-4 if sampled else p > 1e-4


@pytest.mark.crossed(3)
@pytest.mark.parametrize("mistake", ["no residual", "proposal keeps its draws", "not normalized"])
def test_the_statistics_catch_wrong_rules(table_model, monkeypatch, mistake) -> None:
    if mistake == "no residual":
        monkeypatch.setattr(lossless, "residual", lambda p, q, rejected: p)
    elif mistake == "proposal keeps its draws":
        monkeypatch.setattr(lossless, "without", lambda weights, token: weights)
    else:
        monkeypatch.setattr(lossless, "normalized", lambda weights: weights)
    model = table_model(vocab_size=5)
    params = SamplingParams(temperature=1.5, seed=11)
    proposals = table_model(vocab_size=5, seed=9).distributions(SamplingParams(temperature=0.9))
    drafter = SamplingDrafter(proposals, width=3, depth=1)
    counts = emitted_triples(model, params, lambda h: drafter.propose(h[-2], h[-1]), 8_000)
    assert p_value(model, params, counts) < 1e-4


@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    penalty=st.sampled_from([1.0, 1.5]),
)
@settings(max_examples=settings().max_examples * 30 // 20, deadline=None)
def test_equal_seeds_give_plain_decoding_token_for_token(
    table_model, seed, temperature, penalty
) -> None:
    model, rng = table_model(seed=seed % 5), random.Random(seed)
    params = SamplingParams(
        max_tokens=25, temperature=temperature, top_p=0.95, repetition_penalty=penalty, seed=seed
    )
    output, _ = model.generate(
        LosslessVerifier(),
        params,
        PROMPT,
        lambda h: model.random_tree(rng, rng.randint(1, 12), h[-1]),
    )
    assert output == model.decode(params, PROMPT)


@given(
    target=st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any),
    proposal=st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any),
    order=st.permutations(range(6)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=settings().max_examples * 10, deadline=None)
def test_no_impossible_token_whatever_the_zeros(target, proposal, order, seed) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), (), 6)
    p, q = torch.tensor(target).float(), torch.tensor(proposal).float()
    token = lossless.sample_with_candidates(p / p.sum(), q / q.sum(), order, sampler)
    assert target[token] > 0


def test_a_proposal_equal_to_the_target_is_always_accepted(table_model) -> None:
    model = table_model()
    params = SamplingParams(temperature=0.8, seed=0)
    drafter = SamplingDrafter(model.distributions(params), width=1, depth=3)
    sampler = CachedSampler(params, model.vocab_size)
    for _ in range(200):
        tree = drafter.propose(*PROMPT)
        accepted = LosslessVerifier().accept(tree, model.logits(PROMPT, tree), sampler)
        assert accepted.path == (0, 1, 2, 3)


def test_residual_of_equal_distributions_leaves_out_the_rejected_token() -> None:
    p = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    assert lossless.residual(p, p.clone(), 1).tolist() == [0.5, 0.0, 0.5]


def test_temperature_zero_ignores_the_proposals() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    tree = TokenTree((0, 1), (-1, 0), {0: torch.tensor([0.0, 1.0, 0.0])})
    accepted = LosslessVerifier().accept(tree, logits, Sampler(SamplingParams(), [0], 3))
    assert (accepted.path, accepted.token) == ((0, 1), 0)


def test_proposals_over_a_part_of_the_vocabulary_are_refused() -> None:
    tree = TokenTree((0, 1), (-1, 0), {0: torch.tensor([0.5, 0.5])})
    sampler = Sampler(SamplingParams(temperature=1.0), [0], 3)
    with pytest.raises(DrafterError, match=r"\[3\], got \[2\]"):
        LosslessVerifier().accept(tree, torch.zeros(2, 3), sampler)


def test_nan_logits_are_named_not_sampled() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), [0], 3)
    logits = torch.full((2, 3), float("nan"))
    for proposals in ({}, {0: torch.ones(3) / 3}):
        with pytest.raises(NotFinite, match="NaN"):
            LosslessVerifier().accept(TokenTree((0, 1), (-1, 0), proposals), logits, sampler)


def test_logprobs_of_sampled_tokens(table_model) -> None:
    model, tree = table_model(), chain([1, 2, 3])
    logits = model.logits(PROMPT, tree)
    sampler = Sampler(SamplingParams(temperature=0.5, top_k=2, seed=3, logprobs=0), PROMPT, 6)
    accepted = LosslessVerifier().accept(tree, logits, sampler)
    rows = logits.log_softmax(-1)
    for node, entry in zip(accepted.path, accepted.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(rows[node, entry.token]), abs=1e-5)
        assert entry.top == ()
