"""Layers of beams: the first members are draws from the target's joint, exactly, whatever was drafted."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
from exact import Table, law
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.tree import chain
from linspec.verifiers import LosslessVerifier, beam_layers
from linspec.verifiers.beam_layers import accepted_law, joint, judge_layer, layer_width


def pairs(seed: int, beams: int, vocab: int, zeros: float = 0.2) -> Tensor:
    """A joint [beams · vocab]."""
    table = Table(vocab, seed, zeros)
    weights = table((-1,))[:beams].tolist() if beams <= vocab else [1.0] * beams
    weights = [weight + 0.1 for weight in weights]
    return joint(weights, torch.stack([table((beam,)) for beam in range(beams)])).flatten()


def layer_law(
    p: Tensor, q: Tensor, foreign: float, drafts: int, width: int, most: int
) -> dict[tuple[tuple[int, ...], bool], float]:
    """The law of a layer over all drafts from q; `foreign` of them are behind beams that are not held."""
    draws: list[tuple[int | None, float]] = [
        (pair, (1 - foreign) * chance) for pair, chance in enumerate(q.tolist()) if chance > 0
    ]
    draws += [(None, foreign)] if foreign else []
    found: dict[tuple[tuple[int, ...], bool], float] = defaultdict(float)
    for chosen in itertools.product(draws, repeat=drafts):
        chance = 1.0
        for _, share in chosen:
            chance *= share
        held = [pair for pair, _ in chosen]

        def run(sampler, held=held):
            members, kept = judge_layer(p, q * (1 - foreign), held, width, most, sampler)
            return tuple(members), kept

        for result, share in law(run).items():
            found[result] += chance * share
    return found


@pytest.mark.parametrize(("beams", "vocab"), [(1, 5), (2, 3)])
@pytest.mark.parametrize(("drafts", "width"), [(3, 2), (3, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("foreign", [0.0, 0.35])
def test_the_first_members_are_independent_draws_of_the_target(
    beams: int, vocab: int, drafts: int, width: int, foreign: float
) -> None:
    p, q = pairs(1, beams, vocab), pairs(2, beams, vocab)
    found = layer_law(p, q, foreign, drafts, width, width)
    first: dict[tuple[int, ...], float] = defaultdict(float)
    for (members, _), chance in found.items():
        first[members[:width]] += chance
    for members in itertools.product(range(len(p)), repeat=width):
        wanted = 1.0
        for member in members:
            wanted *= float(p[member])
        assert first[members] == pytest.approx(wanted, abs=1e-12)


def test_kept_layers_alone_lean_to_the_drafts() -> None:
    """The caveat: the guarantee is about kept and stopped layers together, and widths tell of tokens."""
    p, q = pairs(1, 1, 5, 0.0), pairs(2, 1, 5, 0.0)
    found = layer_law(p, q, 0.0, 3, 2, 3)
    kept = {members: chance for (members, full), chance in found.items() if full}
    total = sum(kept.values())
    first = torch.zeros(5, dtype=torch.float64)
    for members, chance in kept.items():
        first[members[0]] += chance / total
    assert float((first - p).abs().max()) > 0.01
    assert {len(members) for members, full in found if full} == {2}
    assert {len(members) for members, full in found if not full} == {3}


def test_without_residual_the_enumeration_says_so(monkeypatch) -> None:
    monkeypatch.setattr(beam_layers, "_left", lambda p, q, rejected: p)
    with pytest.raises(AssertionError):
        test_the_first_members_are_independent_draws_of_the_target(1, 5, 3, 2, 0.0)


@given(seed=st.integers(0, 5000), drafts=st.integers(1, 3), foreign=st.sampled_from([0.0, 0.3]))
@settings(max_examples=settings().max_examples, deadline=None)
def test_the_law_of_how_many_are_accepted_is_exact(seed: int, drafts: int, foreign: float) -> None:
    p, q = pairs(seed, 1, 4), pairs(seed + 1, 1, 4)
    expected = accepted_law(p, q * (1 - foreign), drafts)
    assert sum(expected) == pytest.approx(1)
    counts = [0.0] * (drafts + 1)
    draws: list[tuple[int | None, float]] = [(x, (1 - foreign) * float(q[x])) for x in range(4)]
    draws += [(None, foreign)] if foreign else []
    for chosen in itertools.product([each for each in draws if each[1] > 0], repeat=drafts):
        chance = 1.0
        for _, share in chosen:
            chance *= share

        for accepted, share in _accepted_counts(p, q * (1 - foreign), [c for c, _ in chosen]):
            counts[accepted] += chance * share
    assert counts == pytest.approx(expected, abs=1e-12)


def _accepted_counts(p: Tensor, q: Tensor, drafts: list[int | None]) -> list[tuple[int, float]]:
    """(accepted drafts, chance): the specification, coin by coin."""
    ways = [(0, p, 1.0)]
    for draft in drafts:
        following = []
        for accepted, rest, chance in ways:
            keep = 0.0 if draft is None else min(1.0, float(rest[draft] / q[draft]))
            left = (rest - q).clamp(min=0)
            if keep > 0:
                following.append((accepted + 1, p, chance * keep))
            if keep < 1:
                following.append((accepted, left / left.sum(), chance * (1 - keep)))
        ways = following
    return [(accepted, chance) for accepted, _, chance in ways]


def test_equal_joints_accept_all_and_disjoint_ones_none() -> None:
    p = pairs(3, 2, 4, 0.0)
    assert accepted_law(p, p, 4) == pytest.approx([0, 0, 0, 0, 1])
    a = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    b = a.flip(0)
    assert accepted_law(a, b, 3) == [1, 0, 0, 0]
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), (), 4)
    members, kept = judge_layer(a, b, [3, 2, 3], 2, 3, sampler)
    assert not kept and len(members) == 3 and set(members) <= {0, 1}


def test_a_larger_threshold_keeps_fewer_beams() -> None:
    chances = accepted_law(pairs(5, 2, 4, 0.0), pairs(6, 2, 4, 0.0), 6)
    widths = [layer_width(chances, t, 1) for t in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 6 and widths[-1] == 1 and len(set(widths)) > 2
    assert all(sum(chances[n:]) >= 0.7 for n in [layer_width(chances, 0.7, 0)])
    mean = sum(count * chance for count, chance in enumerate(chances))
    assert layer_width(chances, -1, 0) == int(mean)
    assert layer_width(chances, 0.999, 3) == 3


@given(seed=st.integers(0, 10_000))
@settings(max_examples=settings().max_examples * 3, deadline=None)
def test_one_beam_is_ordinary_speculative_sampling_with_the_same_random_numbers(seed: int) -> None:
    p, q = Table(5, seed), Table(5, seed + 1)
    draft = int(torch.multinomial(q(()), 1, generator=torch.Generator().manual_seed(seed)))
    params = SamplingParams(temperature=1.0, seed=seed)
    tree = chain((0, draft), {0: q(())})

    class Exact(Sampler):
        def probabilities(self, logits, extra=()):
            return logits.double().softmax(-1)

    logits = torch.stack([p(()), p((draft,))]).log()
    wanted = LosslessVerifier().accept(tree, logits, Exact(params, (), 5)).emitted(tree)
    sampler = Exact(params, (), 5)
    row = logits[0].softmax(-1)
    members, kept = judge_layer(row, q(()), [draft], 1, 1, sampler)
    if kept:
        members.append(sampler.draw(logits[1].softmax(-1)))
    assert tuple(members) == wanted
