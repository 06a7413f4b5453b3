"""Block verification: the target's law exactly, and never fewer accepted drafts than token by token."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest
import torch
from exact import Table, law
from helpers import full_logits, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.tree import TokenTree, chain
from linspec.drafters.draft_model import DraftModel
from linspec.engine.engine import Engine
from linspec.errors import DrafterError, NotFinite
from linspec.policies.fixed import Fixed
from linspec.verifiers import (
    VERIFIERS,
    BlockVerifier,
    GreedyVerifier,
    LosslessVerifier,
    Verifier,
    block,
    make_verifier,
)

Emitted = dict[tuple[int, ...], float]


def emitted(verifier: Verifier, p: Table, q: Table, drafts: tuple[int, ...]) -> Emitted:
    """The law of what one round emits behind the root, for a chain that was sampled from q."""
    depths = range(len(drafts) + 1)
    logits = torch.stack([p(drafts[:depth]) for depth in depths]).log()
    tree = chain((0, *drafts), {depth: q(drafts[:depth]) for depth in depths[:-1]})
    return law(lambda s: verifier.accept(tree, logits, s).emitted(tree), p.vocab_size)


def rounds(
    verifier: Verifier, p: Table, q: Table, length: int, stops: set[tuple[int, ...]] = frozenset()
) -> Emitted:
    """The law of what a round emits over all chains of `length` drafts; behind `stops` drafting ends."""
    found: Emitted = defaultdict(float)
    ready: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while ready:
        drafts, chance = ready.pop()
        if len(drafts) == length or drafts in stops:
            for tokens, share in emitted(verifier, p, q, drafts).items():
                found[tokens] += chance * share
            continue
        row = q(drafts).tolist()
        ready += [((*drafts, x), chance * w) for x, w in enumerate(row) if w > 0]
    return found


def extended(found: Emitted, p: Table, length: int) -> Emitted:
    """What plain decoding makes of the emitted tokens, `length` tokens in all."""
    whole: Emitted = defaultdict(float)
    for tokens, chance in found.items():
        for rest in itertools.product(range(p.vocab_size), repeat=length - len(tokens)):
            share = chance
            for place in range(len(tokens), length):
                share *= float(p((*tokens, *rest)[:place])[(*tokens, *rest)[place]])
            whole[*tokens, *rest] += share
    return whole


def assert_the_target_s_law(found: Emitted, p: Table, length: int) -> None:
    wanted = extended({(): 1.0}, p, length)
    whole = extended(found, p, length)
    assert set(whole) <= set(wanted)
    for tokens, chance in wanted.items():
        assert whole[tokens] == pytest.approx(chance, abs=1e-12)


@pytest.mark.parametrize(("vocab", "length"), [(3, 2), (4, 2), (3, 3), (4, 3), (3, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_law_of_the_output_is_the_target_s(vocab: int, length: int, seed: int) -> None:
    p, q = Table(vocab, seed), Table(vocab, seed + 100)
    found = rounds(BlockVerifier(), p, q, length)
    assert_the_target_s_law(found, p, length + 1)


@given(seed=st.integers(0, 10_000), zeros=st.sampled_from([0.0, 0.3, 0.6]))
@settings(max_examples=15, deadline=None)
def test_a_chain_may_end_where_its_own_tokens_say_so(seed: int, zeros: float) -> None:
    p, q = Table(3, seed, zeros), Table(3, seed + 1, zeros)
    found = rounds(BlockVerifier(), p, q, 3, stops={(0,), (1, 2), (2, 2)})
    assert_the_target_s_law(found, p, 4)


@given(
    seed=st.integers(0, 10_000), vocab=st.integers(2, 4), length=st.integers(1, 3),
    zeros=st.sampled_from([0.0, 0.3, 0.6]),
)  # fmt: skip
@settings(max_examples=settings().max_examples * 25 // 20, deadline=None)
def test_mean_accepted_is_at_least_that_of_token_by_token(seed, vocab, length, zeros) -> None:
    p, q = Table(vocab, seed, zeros), Table(vocab, seed + 1, zeros)
    means = [
        sum(chance * (len(tokens) - 1) for tokens, chance in rounds(rule, p, q, length).items())
        for rule in (BlockVerifier(), LosslessVerifier())
    ]
    assert means[0] >= means[1] - 1e-12


def test_two_tokens_of_the_paper_s_example_accept_more() -> None:
    # section 1 of the paper: p = (1/3, 2/3), q = (2/3, 1/3) at every place: 11/9 against 10/9
    p, q = Table(2, 0), Table(2, 0)
    for prefix in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)):
        p.rows[prefix] = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
        q.rows[prefix] = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    means = [
        sum(chance * (len(tokens) - 1) for tokens, chance in rounds(rule, p, q, 2).items())
        for rule in (BlockVerifier(), LosslessVerifier())
    ]
    assert means == pytest.approx([11 / 9, 10 / 9])


def test_certain_drafts_among_sampled_ones_keep_the_law() -> None:
    p, q = Table(3, 5, 0.0), Table(3, 6, 0.0)
    found: Emitted = defaultdict(float)
    for first in range(3):
        # the second draft is a function of the first; the third comes from a proposal that excludes it
        second, third = (first + 1) % 3, 2
        tree = chain(
            (0, first, second, third),
            {0: q(()), 2: torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)},
        )
        logits = torch.stack([p(tree.tokens[1 : 1 + d]) for d in range(4)]).log()
        mine = law(lambda s, t=tree, y=logits: BlockVerifier().accept(t, y, s).emitted(t), 3)
        for tokens, share in mine.items():
            found[tokens] += float(q(())[first]) * share
    assert_the_target_s_law(found, p, 4)


@pytest.mark.parametrize(
    "mistake", ["no residual", "chances are shares", "the rest is that of the root"]
)
def test_the_enumeration_catches_wrong_rules(monkeypatch, mistake: str) -> None:
    right = block.block_law

    def wrong(p, q, drafts):
        shares, chances = right(p, q, drafts)
        if mistake == "chances are shares":
            return shares, shares[1:]
        return [1.0] * len(shares), chances

    if mistake == "no residual":
        monkeypatch.setattr(block, "left_over", lambda share, p, q: p)
    else:
        monkeypatch.setattr(block, "block_law", wrong)
    p, q = Table(4, 0, 0.0), Table(4, 100, 0.0)
    with pytest.raises(AssertionError):
        assert_the_target_s_law(rounds(BlockVerifier(), p, q, 3), p, 4)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}])
def test_with_a_draft_model_in_the_engine(params: dict[str, float]) -> None:
    """Three tokens over an alphabet of four: chi-square against the exact law."""
    model, small = tiny_model("softmax"), tiny_model("aug", seed=9)
    allowed, prompt, count = (3, 7, 11, 19), (1, 2, 3), 1000
    asked = SamplingParams(max_tokens=3, allowed_token_ids=allowed, seed=1, **params)
    engine = Engine(
        model, verifier=make_verifier("block"), drafter=DraftModel(small, model.config, 64),
        policy=Fixed(2), slots=64,
    )  # fmt: skip
    for request in range(count // 1000):
        many = SamplingParams(
            max_tokens=3, n=1000, allowed_token_ids=allowed, seed=request, **params
        )
        engine.add(Request(prompt, many))
    counts: Counter[tuple[int, ...]] = Counter()
    longest = 0
    while engine.busy:
        for outcome in engine.step():
            longest = max(longest, len(outcome.tokens))
            if outcome.finished:
                counts[tuple(outcome.sequence.tokens[3:])] += 1
    assert longest > 1, "no draft was accepted"
    texts = list(itertools.product(allowed, repeat=3))
    chances = dict.fromkeys(texts, 1.0)
    prefixes = {text[:depth] for text in texts for depth in range(3)}
    for prefix in sorted(prefixes):
        sampler = Sampler(asked, prompt, model.config.vocab_size)
        row = sampler.probabilities(full_logits(model, [(*prompt, *prefix)])[0], prefix).double()
        for text in texts:
            if text[: len(prefix)] == prefix:
                chances[text] *= float(row[text[len(prefix)]])
    expected = torch.tensor([chances[text] for text in texts]) * count
    observed = torch.tensor([counts[text] for text in texts]).double()
    assert not observed[expected == 0].any() and counts.total() == count
    common = expected >= 5
    seen = [*observed[common].tolist(), float(observed[~common].sum())]
    due = [*expected[common].tolist(), float(expected[~common].sum())]
    if due[-1] < 5:
        seen, due = seen[:-1], [each * sum(seen[:-1]) / sum(due[:-1]) for each in due[:-1]]
    assert chisquare(seen, [each * sum(seen) / sum(due) for each in due]).pvalue > 1e-4


@given(seed=st.integers(0, 10_000), length=st.integers(0, 4))
@settings(max_examples=settings().max_examples * 30 // 20, deadline=None)
def test_greedy_requests_are_the_greedy_verifier_s(seed: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(length + 1, 5, generator=generator)
    drafts = torch.randint(5, (length + 1,), generator=generator).tolist()
    tree = chain(drafts, {node: torch.full((5,), 0.2) for node in range(length)})
    found, wanted = (
        rule.accept(tree, logits, Sampler(SamplingParams(logprobs=1), [0], 5))
        for rule in (BlockVerifier(), GreedyVerifier())
    )
    assert found == wanted


@pytest.mark.parametrize("kind", ["certain", "tree"])
def test_certain_chains_and_trees_are_judged_as_lossless_judges_them(kind: str) -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    tree = chain((0, 1, 2, 3))
    if kind == "tree":
        q = torch.full((5,), 0.2)
        tree = TokenTree((0, 1, 2, 3), (-1, 0, 0, 1), {0: q, 1: q})
    for seed in range(40):
        params = SamplingParams(temperature=1.0, seed=seed)
        found, wanted = (
            rule.accept(tree, logits, Sampler(params, [0], 5))
            for rule in (BlockVerifier(), LosslessVerifier())
        )
        assert found == wanted


def test_a_proposal_equal_to_the_target_is_always_accepted() -> None:
    p = Table(4, 1, 0.0)
    for drafts in itertools.product(range(4), repeat=3):
        found = emitted(BlockVerifier(), p, p, drafts)
        assert sum(chance for tokens, chance in found.items() if len(tokens) == 4) > 1 - 1e-12


def test_registered_and_named_errors() -> None:
    entry = VERIFIERS.entry("block")
    assert entry.value is BlockVerifier and "2403.10444" in entry.paper
    assert entry.facts["lossless"] == "yes"
    sampler = Sampler(SamplingParams(temperature=1.0), [0], 3)
    narrow = TokenTree((0, 1), (-1, 0), {0: torch.tensor([0.5, 0.5])})
    with pytest.raises(DrafterError, match=r"\[3\], got \[2\]"):
        BlockVerifier().accept(narrow, torch.zeros(2, 3), sampler)
    wide = TokenTree((0, 1), (-1, 0), {0: torch.ones(3) / 3})
    with pytest.raises(NotFinite):
        BlockVerifier().accept(wide, torch.full((2, 3), float("nan")), sampler)
