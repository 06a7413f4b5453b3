"""Reading a prompt in pieces: what changes, and why quantized weights show more of it.

Pieces that begin at multiples of 16 tokens add up the rows of a group in the order in which the whole
prompt does; others add in another order, which moves float32 sums by about 1e-7. Float weights pass
that on. Quantized layers round their inputs to 8-bit codes, and an input that lies at the border
between two codes goes to the other one: a step of 1/127 of the largest input of its row. So the
difference is that of any change of 1e-7, and the test compares it with one.
"""

from __future__ import annotations

import pytest
import torch

from linspec.checkpoints.hub import load_tokenizer
from linspec.checkpoints.load_quantized import load_for
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.engine.scheduler import Scheduler
from linspec.kernels.cpu.library import load as load_kernels
from linspec.models.decoder import Decoder

TOKENS = 480


def logprobs(model: Decoder, ids: list[int], piece: int) -> torch.Tensor:
    state = model.new_state(1)
    outputs = []
    for begin in range(0, len(ids), piece):
        part = ids[begin : begin + piece]
        outputs.append(model.step([StepInput(0, part)], state).logits)
        state.commit(0, range(len(part)))
    return torch.cat(outputs).double().log_softmax(-1)


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def ids() -> list[int]:
    with open(__file__, encoding="utf-8") as file:
        found: list[int] = load_tokenizer("embedded-aug")(file.read() * 2)["input_ids"]
    assert len(found) >= TOKENS
    return found[:TOKENS]


@pytest.mark.parametrize("budget", [512, 100, 64, 33])
def test_pieces_of_a_prompt_begin_at_multiples_of_64_beside_other_prompts(budget: int) -> None:
    """Of 16 where a step takes fewer than 64 tokens."""
    scheduler, lengths = Scheduler(4, budget), (40, 700, 33, 130)

    for place, length in enumerate(lengths):
        sampler = Sampler(SamplingParams(), [1], 10)
        scheduler.submit([RunningSequence(place, sampler, [1] * length, length)])
    scheduler.admit()
    begins = []
    while any(row.prefilling for row in scheduler.running):
        batch = scheduler.next_batch()
        assert sum(count for _, count in batch.prefilling) <= budget
        assert batch.prefilling
        for row, count in batch.prefilling:
            begins.append(row.prefilled)
            row.prefilled += count
    assert [row.prefilled for row in scheduler.running] == list(lengths)
    assert all(begin % (64 if budget >= 64 else 16) == 0 for begin in begins)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_pieces_of_a_prompt_change_no_more_than_a_change_in_the_last_bit_of_a_weight(
    bits: int | None, ids: list[int]
) -> None:
    if load_kernels().library is None:
        pytest.skip("no C library")
    model = load_for("embedded-aug", bits).to_inference()
    whole = logprobs(model, ids, TOKENS)
    for piece in (16, 64, 128):
        assert furthest(logprobs(model, ids, piece), whole) < 5e-5, piece
    odd = max(furthest(logprobs(model, ids, piece), whole) for piece in (33, 65, 100))
    with torch.no_grad():
        model.layers[0].mixer_norm.get_parameter("weight").mul_(1 + 1e-7)
    model.finalize_weights()
    nudged = furthest(logprobs(model, ids, TOKENS), whole)
    assert odd < max(5e-5, 3 * nudged)
    # the nudge itself shows which of the two rounds
    assert (nudged > 1e-3) is (bits is not None)
