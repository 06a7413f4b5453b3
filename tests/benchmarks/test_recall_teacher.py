"""The teacher that recalls: its texts ask for what they said, and its rotations are those of the base."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.recall_teacher import (
    ANSWER,
    BASE,
    RECIPE,
    RecallTexts,
    length_at,
    make_teacher,
    without_slow_turns,
)
from linspec.checkpoints.hub import load_config, load_model, load_tokenizer
from linspec.mixers.rope_config import RopeConfig
from linspec.models.decoder import Decoder
from linspec.train.data import Windows

SMALL = replace(RECIPE, lengths=((96, 1), (160, 1)), short=1, positions=256)


def texts() -> RecallTexts:
    stream = np.arange(5000, dtype=np.int32) % 4000 + 1
    return RecallTexts(Windows(stream, 512, seed=3), load_tokenizer(BASE), RECIPE)


def test_the_slower_frequencies_stand_still() -> None:
    base = load_model(BASE)
    still = tuple([1.0] * 16 + [1e30] * 16)
    rope = RopeConfig(kind="longrope", short_factors=still, long_factors=still)
    wanted = Decoder(replace(base.config, rope=rope)).eval()
    wanted.load_state_dict(base.state_dict())
    made = without_slow_turns(base, 0.5, 2048).eval()
    ids = torch.randint(1, 4096, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(made.hidden(ids), wanted.hidden(ids), rtol=1e-4, atol=1e-4)
    assert made.config.position_limit == 2048
    assert load_config(BASE).rope.theta ** 0.5 == pytest.approx(made.config.rope.theta)


def test_answers_that_count_stood_above() -> None:
    found = 0
    for seed in range(20):
        tokens, counts = texts().text(600, random.Random(seed))
        assert len(tokens) == len(counts) == 600
        ends = [at for at in range(599) if counts[at] == ANSWER and counts[at + 1] != ANSWER]
        found += len(ends)
        for end in ends:
            # the last token of the cue and the answer behind it, somewhere above
            begin = next(at for at in range(end, -1, -1) if counts[at] != ANSWER)
            piece = tokens[begin : end + 1]
            above = [tokens[at : at + len(piece)] for at in range(begin - len(piece) + 1)]
            assert piece in above
    assert found > 50


def test_batches_are_those_of_seed_and_step() -> None:
    one, other = (texts().batch(7, 3, 200) for _ in range(2))
    assert one.shape == (3, 201, 2)
    assert torch.equal(one, other)
    assert not torch.equal(one, texts().batch(8, 3, 200))


def test_lengths_take_turns_behind_the_short_ones() -> None:
    recipe = replace(RECIPE, lengths=((512, 8), (2048, 2)), short=2)
    assert [length_at(step, recipe)[0] for step in range(5)] == [512, 512, 512, 2048, 512]


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line of running text that goes on\n" * 400)
    data = [str(tmp_path / "text.txt")]
    recipe = replace(SMALL, train=replace(SMALL.train, steps=2))
    out = make_teacher(tmp_path / "teacher", recipe, data)
    assert load_config(out).max_positions == 256
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert make_teacher(out, recipe, data) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == written
