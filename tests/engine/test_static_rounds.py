"""Whole requests through recorded steps of static shape: the tokens of the same model layer by layer.

Where a request lets it, the step also judges the trees (`decoding/device_acceptance.py`); heads draft in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from op_tape import TapeRecorder
from test_engine import DRAFTERS, GREEDY, PROMPTS, SLOTS, decode, outputs

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.drafters.medusa import Medusa
from linspec.engine.engine import Engine
from linspec.models.decoder import Decoder
from linspec.models.static_step import StaticStep
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

# whatever hands a number of a tensor to Python
READS = ("tolist", "item", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__")


def recorded(mixer: str) -> tuple[Decoder, TapeRecorder]:
    model, recorder = tiny_model(mixer).to_inference(), TapeRecorder()
    model.native = StaticStep(model, recorder)
    return model, recorder


@pytest.mark.crossed(5)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("mixer", ["softmax", "aug", "gla"])
def test_greedy_with_a_drafter_is_plain_greedy_by_layer(drafter: str, mixer: str) -> None:
    plain = outputs(decode(tiny_model(mixer), PROMPTS, GREEDY))
    model, recorder = recorded(mixer)
    assert outputs(decode(model, PROMPTS, GREEDY, DRAFTERS[drafter](model))) == plain
    assert recorder.recorded > 0


def test_a_seed_gives_the_same_tokens() -> None:
    params = [SamplingParams(max_tokens=20, temperature=0.9, seed=seed) for seed in range(5)]
    model, _ = recorded("aug")
    assert outputs(decode(model, PROMPTS, params)) == outputs(
        decode(tiny_model("aug"), PROMPTS, params)
    )


# judged in the step; on the host, for each of the reasons to be judged there
MIXED = [
    SamplingParams(max_tokens=25),
    SamplingParams(max_tokens=25, temperature=0.8, seed=1),
    SamplingParams(max_tokens=25, repetition_penalty=1.3),
    SamplingParams(max_tokens=25, temperature=0.8, top_p=0.8, seed=2),
    SamplingParams(max_tokens=25, logprobs=2),
    SamplingParams(max_tokens=25, temperature=1.1, seed=3, stop_token_ids=(3, 4, 5, 6)),
    SamplingParams(max_tokens=25, logit_bias={1: 2.0}),
    SamplingParams(max_tokens=25, stop_token_ids=(3, 4, 5, 6, 7)),
]


@pytest.mark.parametrize("drafter", [None, "lookup", "medusa", "random"])
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_requests_of_every_kind_share_a_batch(drafter: str | None, mixer: str) -> None:
    prompts = [random_tokens(3 + i, i) for i in range(len(MIXED))]
    plain = decode(tiny_model(mixer), prompts, MIXED)
    model, _ = recorded(mixer)
    found = decode(model, prompts, MIXED, DRAFTERS[drafter](model) if drafter else None)
    assert outputs(found) == outputs(plain)


def engine_of(model: Decoder, drafter: Medusa | None) -> Engine:
    """With two greedy requests whose prompts are read."""
    engine = Engine(
        model, verifier=LosslessVerifier(), drafter=drafter, policy=Fixed(6), slots=SLOTS
    )
    for prompt in ([3, 4, 5], [6, 7, 8, 9]):
        engine.add(Request(tuple(prompt), SamplingParams(max_tokens=40, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    return engine


@pytest.mark.parametrize("drafter", [None, "medusa"])
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_round_reads_from_the_device_once(
    drafter: str | None, mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sequences there are; verifier and heads are not asked."""
    model, recorder = recorded(mixer)
    engine = engine_of(model, DRAFTERS[drafter](model) if drafter else None)  # type: ignore[arg-type]
    reads: list[str] = []

    def counted(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *given: Any) -> Any:
            reads.append(name)
            return read(tensor, *given)

        return call

    made = recorder.recorded
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    for rounds in range(1, 4):
        outcomes = engine.step()
        assert len(outcomes) == 2
        assert all(outcome.error is None and outcome.tokens for outcome in outcomes)
        assert reads == ["tolist"] * rounds
    assert recorder.recorded == made


def test_heads_draft_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trees as the heads draft when they are asked, which is in first rounds alone."""
    model, _ = recorded("aug")
    medusa: Any = DRAFTERS["medusa"](model)
    ready: list[bool] = []

    def trees(sequences: Any, budgets: Any) -> Any:
        found = Medusa.propose(medusa, sequences, budgets)
        for sequence, budget, tree in zip(sequences, budgets, found, strict=True):
            ready.append(bool(sequence.follow))
            follow, sequence.follow = sequence.follow, ()
            assert Medusa.propose(medusa, [sequence], [budget]) == [tree]
            sequence.follow = follow
        return found

    monkeypatch.setattr(medusa, "propose", trees)
    rows = decode(model, PROMPTS, GREEDY, medusa)
    assert ready.count(False) == len([row for row in rows if row.stats.draft_rounds])
    assert ready.count(True) > 20
