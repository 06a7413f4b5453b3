"""Held-out text is walked as an engine decodes: the same rounds, the same drafts tried and accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import decode

from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.drafters.base import Drafter
from linspec.drafters.block import Block
from linspec.drafters.eagle import Eagle, EagleOptions
from linspec.drafters.medusa import Medusa
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.train.drafters import TRAININGS
from linspec.train.drafters.states import states_of
from linspec.train.drafters.walk import Prediction, Walk
from tests.block_drafters import make_target

DRAFTS = 3


def simulated(
    ids: Sequence[int], chosen: Sequence[int], guesses: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[list[int]], list[int], list[int]]:
    """Hits by depth and rank, tries by depth and the places of roots, a token at a time."""
    ranks = len(guesses[0][0]) if guesses else 0
    hits, tried, roots = [[0] * ranks for _ in range(DRAFTS)], [0] * DRAFTS, []
    root = 1
    while root - 1 < len(guesses):
        if chosen[root - 1] != ids[root]:
            root += 1
            continue
        roots.append(root)
        newest = root
        for depth in range(DRAFTS):
            if newest >= len(chosen):
                break
            guess, wanted = guesses[root - 1][depth], chosen[newest]
            tried[depth] += 1
            for rank in range(ranks):
                hits[depth][rank] += guess[rank] == wanted
            if guess[0] != wanted:
                break
            newest += 1
            if newest == len(ids) or ids[newest] != wanted:
                break
        # the token behind the newest that was accepted is the next root, or what the text has instead
        root = newest + 1
    return hits, tried, roots


@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(2, 5), st.booleans())
def test_a_walk_counts_what_a_simulation_counts(
    seed: int, length: int, words: int, spare: bool
) -> None:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, words, length)
    ids = np.concatenate((rng.integers(0, words, 1), chosen))[: length + spare]
    strange = rng.random(len(ids)) < 0.1
    ids = np.where(strange, rng.integers(0, words, len(ids)), ids)
    guesses = rng.integers(0, words, (length - 1, DRAFTS, 2))
    # half of the drafts are right, as far as there are places for them
    for row, depth in np.argwhere(rng.random((length - 1, DRAFTS)) < 0.5):
        if row + 1 + depth < length:
            guesses[row, depth, 0] = chosen[row + 1 + depth]
    walk = Walk(DRAFTS, 2)
    walk.add(*(torch.from_numpy(each) for each in (ids, chosen, guesses)))
    hits, tried, _ = simulated(ids.tolist(), chosen.tolist(), guesses.tolist())
    expected = [
        [hit / max(1, tries) for hit in row] for row, tries in zip(hits, tried, strict=True)
    ]
    found = walk.rates()
    assert len(found) == max(1, sum(tries > 0 for tries in tried))
    for row, wanted in zip(found, expected, strict=False):
        assert row == pytest.approx(wanted, abs=1e-5)


def test_a_text_of_the_target_has_as_many_tokens_as_rounds_times_the_prediction() -> None:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 3, 4000)
    ids, guesses = np.concatenate(([0], chosen)), rng.integers(0, 3, (3999, DRAFTS, 1))
    walk = Walk(DRAFTS, 1)
    walk.add(*(torch.from_numpy(each) for each in (ids, chosen, guesses)))
    rounds = len(simulated(ids.tolist(), chosen.tolist(), guesses.tolist())[2])
    assert walk.prediction().tokens_per_round == pytest.approx(4000 / rounds, rel=0.005)


def test_a_prediction_is_a_sentence() -> None:
    assert str(Prediction.of([0.5, 0.42], 2)) == "predicts 1.71 tokens a round with 2 drafts"


def test_a_text_without_any_choice_of_the_target_promises_nothing() -> None:
    walk = Walk(2, 1)
    walk.add(torch.zeros(6, dtype=torch.long), torch.ones(5).long(), torch.ones(4, 2, 1).long())
    assert walk.rates() == [[0.0]] and walk.prediction().tokens_per_round == 1.0


# ---- what an engine counts


def served(model: Decoder, tokens: int, drafter: Drafter | None = None) -> RunningSequence:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return decode(model, [[3]], params, drafter, policy=Fixed(DRAFTS))[0]


def half_trained(kind: str, model: Decoder, ids: torch.Tensor) -> tuple[Any, Any]:
    """A training and its drafter, which guesses some of a text."""
    training = TRAININGS.build(kind)
    drafter = training.make(model, ids.numpy(), 0)
    optimizer = torch.optim.Adam(drafter.parameters(), 3e-3)
    states = states_of(model, ids[None], training.reads(model.config))
    for _ in range(30):
        optimizer.zero_grad()
        training.loss(drafter, states).backward()
        optimizer.step()
    return training, drafter.eval().requires_grad_(False)


def eagle_of(net: Any) -> Drafter:
    return Eagle(net, slots=4, options=EagleOptions(top=1, depth=DRAFTS))


def chain_of_heads(heads: Any) -> Drafter:
    heads.accuracies = [[0.5]] * DRAFTS
    return Medusa(heads)


@pytest.mark.crossed(3)
@pytest.mark.parametrize(
    ("kind", "drafter_of"),
    [
        (f"eagle:vocabulary=0,depth={DRAFTS}", eagle_of),
        (f"block:vocabulary=0,places={DRAFTS},window=16,rank=8", Block),
        (f"medusa:heads={DRAFTS},hidden=8", chain_of_heads),
    ],
    ids=["eagle", "block", "medusa"],
)
def test_what_is_predicted_is_what_is_served(
    kind: str, drafter_of: Callable[[Any], Drafter]
) -> None:
    """The target's own text: the rounds that are walked are those of an engine, but for its last ones."""
    model, tokens = make_target("aug").requires_grad_(False), 200
    text = served(model, tokens).tokens
    ids = torch.tensor(text)
    training, drafter = half_trained(kind, model, ids)
    predicted = training.measure(drafter, ids.numpy(), context=len(ids), tokens=len(ids))
    row = served(model, tokens, drafter_of(drafter))
    assert row.tokens == text
    assert row.stats.tokens_per_round == pytest.approx(predicted.tokens_per_round, rel=0.02)
    assert 1.1 < predicted.tokens_per_round < 3.8
