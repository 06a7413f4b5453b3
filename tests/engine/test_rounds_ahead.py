"""Rounds that a device runs ahead: fewer steps for the same tokens, whatever comes between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from helpers import random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tape import TapeRecorder
from test_engine import DRAFTERS, decode, outputs

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, root_only
from linspec.drafters.base import Drafter
from linspec.engine.engine import Engine
from linspec.engine.loops.rounds_ahead import RoundsAhead
from linspec.engine.prefix_cache import PrefixOptions
from linspec.models.decoder import Decoder
from linspec.models.static_step import StaticStep
from linspec.policies.base import Policy
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

PLAIN = {name: tiny_model(name).to_inference() for name in ("softmax", "aug")}
STATIC = {name: tiny_model(name).to_inference() for name in PLAIN}
for _model in STATIC.values():
    _model.native = StaticStep(_model, TapeRecorder())


class Restless(Policy):
    """Another size in some rounds, none in others."""

    def __init__(self, seed: int) -> None:
        self.rng, self.nodes = random.Random(seed), 4

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        if self.rng.random() < 0.3:
            self.nodes = self.rng.choice((0, 2, 4, 6))
        return [Budget.of(self.nodes)] * len(sequences)


def counted(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inputs each step of a model had, as they are made."""
    steps: list[int] = []
    run: Callable[..., Any] = model.native.run  # type: ignore[union-attr]

    def count(inputs: Any, *given: Any) -> Any:
        steps.append(len(inputs))
        return run(inputs, *given)

    monkeypatch.setattr(model.native, "run", count)
    return steps


def engine_of(model: Decoder, drafter: str | None, policy: Policy, **settings: Any) -> Engine:
    return Engine(
        model,
        verifier=LosslessVerifier(),
        drafter=DRAFTERS[drafter](model) if drafter else None,
        policy=policy,
        **{"slots": 3} | settings,
    )


@pytest.mark.parametrize("drafter", [None, "medusa"])
@pytest.mark.parametrize("mixer", PLAIN)
def test_fewer_steps_give_the_same_tokens(
    drafter: str | None, mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = STATIC[mixer]
    params = [
        SamplingParams(max_tokens=60, ignore_eos=True),
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, seed=3),
    ]
    prompts = [random_tokens(5), random_tokens(9, 1)]
    plain = decode(PLAIN[mixer], prompts, params)
    steps = counted(model, monkeypatch)
    rows = decode(model, prompts, params, DRAFTERS[drafter](model) if drafter else None)
    assert outputs(rows) == outputs(plain)
    rounds = max(row.stats.rounds for row in rows)
    assert rounds > 30 if drafter else rounds == 59
    # 2, 4, 8, 8, … rounds in a step; the end of one sequence may cut a few off
    assert len(steps) < rounds / 3


@settings(max_examples=settings().max_examples * 2)
@given(
    seed=st.integers(0, 2**20),
    mixer=st.sampled_from(sorted(PLAIN)),
    drafter=st.sampled_from([None, "medusa", "lookup"]),
)
def test_whatever_comes_between_rounds(seed: int, mixer: str, drafter: str | None) -> None:
    """Requests come, are dropped, end early, have to leave their slot; the policy changes its mind."""
    rng = random.Random(seed)
    cache = PrefixOptions(bytes=1 << 20) if rng.random() < 0.5 else None
    engine = engine_of(STATIC[mixer], drafter, Restless(seed), prefix_cache=cache)
    requests = [
        Request(
            tuple(random_tokens(rng.randrange(1, 20), seed + i)),
            SamplingParams(
                max_tokens=rng.randrange(1, 40),
                temperature=rng.choice((0.0, 0.0, 0.9)),
                repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.2)),
                stop_token_ids=rng.choice(((), (3,))),
                seed=i,
            ),
            priority=rng.randrange(2),
        )
        for i in range(6)
    ]
    asked: dict[int, Request] = {}
    found: dict[int, list[int]] = {}
    waiting, dropped = list(requests), set[int]()
    while waiting or engine.busy:
        if waiting and rng.random() < 0.2:
            request = waiting.pop(0)
            asked[engine.add(request)] = request
        if asked and rng.random() < 0.03:
            dropped.add(rng.choice(list(asked)))
            engine.abort(max(dropped))
        for outcome in engine.step():
            assert outcome.error is None
            found.setdefault(outcome.sequence.request, []).extend(outcome.tokens)
    for handle, request in asked.items():
        (row,) = decode(PLAIN[mixer], [request.prompt], request.params)
        tokens = found.get(handle, [])
        (wanted,) = outputs([row])
        assert tokens == (wanted[: len(tokens)] if handle in dropped else wanted)


def test_who_leaves_its_slot_takes_along_what_was_handed_out() -> None:
    engine = engine_of(STATIC["aug"], None, Fixed(0), slots=1)
    first = engine.add(
        Request((3, 4, 5), SamplingParams(max_tokens=30, ignore_eos=True), priority=0)
    )
    rows: dict[int, RunningSequence] = {}
    for _ in range(10):
        rows |= {each.sequence.request: each.sequence for each in engine.step()}
    (row,) = rows.values()
    # some are handed out and not committed
    assert engine.state.length(row.slot) < len(row.tokens) - 1
    engine.add(Request((6, 7), SamplingParams(max_tokens=5, ignore_eos=True), priority=1))
    while engine.busy:
        rows |= {each.sequence.request: each.sequence for each in engine.step()}
    assert rows[first].preempted == 1
    for row in rows.values():
        prompt, params = row.tokens[: row.prompt_length], row.params
        assert outputs([row]) == outputs(decode(PLAIN["aug"], [prompt], params))


def test_rounds_double_until_some_were_forgotten() -> None:
    ahead = RoundsAhead(None, most=8)
    row = decode(PLAIN["aug"], [[3, 4]], SamplingParams(max_tokens=1))[0]
    object.__setattr__(row.params, "max_tokens", 100)
    trees = [(row, root_only(row.root))]
    assert [ahead.rounds(trees, None) for _ in range(4)] == [2, 4, 8, 8]
    ahead._forgotten = True
    assert [ahead.rounds(trees, None) for _ in range(2)] == [1, 2]
    # no further than there are positions, and tokens to give
    for _ in range(3):
        ahead.rounds(trees, None)
    assert ahead.rounds(trees, len(row.tokens) + 3) == 3
    object.__setattr__(row.params, "max_tokens", 6)
    assert ahead.rounds(trees, None) == 5
