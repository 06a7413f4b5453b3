"""Whole requests through recorded steps of static shape: the tokens of the same model layer by layer."""

from __future__ import annotations

import pytest
from helpers import tiny_model
from op_tape import TapeRecorder
from test_engine import DRAFTERS, GREEDY, PROMPTS, decode, outputs

from linspec.decoding.sampling import SamplingParams
from linspec.models.decoder import Decoder
from linspec.models.static_step import StaticStep


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
