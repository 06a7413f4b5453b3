"""The worked example of docs/adding-a-drafter.md drafts, pays and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from copying import copying, periodic
from helpers import random_tokens, tiny_model

from linspec import DRAFTERS, Drafter, DrafterContext
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.engine.engine import Engine
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-drafter.md"


@pytest.fixture
def example() -> Iterator[str]:
    """The drafter that the page's block registers, as long as a test lasts."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(block.splitlines()) <= 46
    before = set(DRAFTERS.names())
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), {"__name__": "worked_example"})
    (name,) = set(DRAFTERS.names()) - before
    yield name
    DRAFTERS.forget(name)


def decoded(
    model: Decoder, drafter: Drafter | None, prompts: list[list[int]], temperature: float = 0.0
) -> list[RunningSequence]:
    engine = Engine(model, verifier=LosslessVerifier(), drafter=drafter, policy=Fixed(5))
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=30, temperature=temperature, seed=seed, ignore_eos=True)
        engine.add(Request(tuple(prompt), params))
    found = {}
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            if outcome.finished:
                found[outcome.sequence.request] = outcome.sequence
    return [found[request] for request in sorted(found)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_the_worked_example_is_lossless(example: str, mixer: str, temperature: float) -> None:
    model, prompts = tiny_model(mixer), [random_tokens(n, seed=n) for n in (1, 2, 9)]
    prompts[2] = prompts[2] * 2
    plain = decoded(model, None, prompts, temperature)
    drafter = DRAFTERS.build(f"{example}:most=500", DrafterContext(model, slots=8))
    for _ in range(2):
        # the second time it has seen the answers
        found = decoded(model, drafter, prompts, temperature)
        assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert found[2].stats.accepted > 0 or temperature


def test_the_worked_example_pays_where_a_text_repeats(example: str) -> None:
    model = copying()
    drafter = DRAFTERS.build(example, DrafterContext(model))
    (found,) = decoded(model, drafter, [periodic(11)])
    assert found.stats.tokens_per_round > 4
    mixed = DRAFTERS.build(f"{example}+prompt-lookup", DrafterContext(model))
    (again,) = decoded(model, mixed, [periodic(11)])
    assert again.tokens == found.tokens
