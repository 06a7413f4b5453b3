"""SpecDiff-2 in training: the expected streak, the rounds of a window, and what calibration brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import model_dir
from copying import SYMBOLS, copying, periodic
from helpers import assert_close, kill_before
from safetensors.torch import load_file
from test_drafter_kinds import deep_teacher
from test_engine import random_denoiser
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import load_model, save_model
from linspec.drafters.specdiff_net import SpecDiffNet
from linspec.errors import ConfigError
from linspec.train.drafters import TRAININGS, DrafterConfig, train_drafter
from linspec.train.drafters.specdiff import rounds_of, streak_loss
from linspec.train.drafters.states import states_of

SHARES = torch.tensor([0.9, 0.5, 0.8], dtype=torch.float64)


def test_the_expected_streak_of_a_hand_example() -> None:
    assert float(streak_loss(SHARES.log(), "streak")) == pytest.approx(-1.71)
    # behind sure drafts all count alike
    assert float(streak_loss(SHARES.log(), "ce")) == pytest.approx(-float(SHARES.log().sum()))


def test_its_gradient_is_that_of_finite_differences() -> None:
    right = SHARES.log().requires_grad_()
    (found,) = torch.autograd.grad(streak_loss(right, "streak"), right)
    small = 1e-6
    for at in range(3):
        step = torch.zeros(3, dtype=torch.float64).index_fill(0, torch.tensor(at), small)
        ends = [float(streak_loss((right + sign * step).detach(), "streak")) for sign in (1, -1)]
        assert float(found[at]) == pytest.approx((ends[0] - ends[1]) / (2 * small), rel=1e-5)


def test_the_cross_entropy_of_a_draft_weighs_what_reaches_it() -> None:
    right = SHARES.log().requires_grad_()
    (found,) = torch.autograd.grad(streak_loss(right, "ce-streak", warm=0.2), right)
    assert_close(-found, torch.tensor([1.2, 1.1, 0.65], dtype=torch.float64))


def test_rounds_cover_a_window_and_are_judged_within_it() -> None:
    generator, read = torch.Generator().manual_seed(0), []
    for length in (6, 7, 40, 200):
        for _ in range(50):
            ends = rounds_of(length, 4, generator)
            assert int(ends[0]) >= 0 and int(ends[-1]) + 4 <= length
            read += ends.diff().tolist()
    assert {*read} == {1, 2, 3, 4, 5}
    assert np.mean(read) == pytest.approx(1.94, abs=0.1)


def test_a_start_with_fewer_tokens_and_an_unknown_objective_are_named() -> None:
    with pytest.raises(
        ConfigError, match="objective must be one of ce-streak, streak, ce, got 'x'"
    ):
        TRAININGS.build("specdiff:objective=x")
    training = TRAININGS.build(f"specdiff:model={model_dir('softmax')}")
    with pytest.raises(ConfigError, match="tokens, the target 4096: both must share one tokenizer"):
        training.make(load_model("embedded-softmax"), np.zeros(0), 0)


def test_a_run_that_was_killed_goes_on_to_the_same_drafter(
    tokenizer: PreTrainedTokenizerFast, corpus: Path, tmp_path: Path
) -> None:
    model = save_model(deep_teacher(len(tokenizer)), tokenizer, tmp_path / "model")
    short = DrafterConfig(
        tokens=8 * 128, context=32, batch_tokens=128, calibration_tokens=256, save_every=0
    )
    made = []
    for name in ("whole", "killed"):
        out = tmp_path / name
        if name == "killed":
            with kill_before(5), pytest.raises(RuntimeError, match="killed before"):
                train_drafter(model, out, kind="specdiff", data=[corpus], config=short)
        train_drafter(
            model, out, kind="specdiff", data=[corpus], config=short, resume=name == "killed"
        )
        made.append(load_file(out / "drafter.safetensors"))
    assert {*made[0]} == {*made[1]}
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("objective", ["ce-streak", "streak", "ce"])
def test_calibration_lengthens_streaks(objective: str) -> None:
    """A random denoiser learns to copy what its target copies."""
    target = copying().requires_grad_(False)
    stream = np.array(periodic(4000), dtype=np.int64)
    training = TRAININGS.build(f"specdiff:objective={objective},soft=1,places=3")
    # that is the target's own, which can draft at once here
    training.make(target, stream, 0)
    drafter = SpecDiffNet.starting_from(random_denoiser(SYMBOLS), SYMBOLS, 3)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    before = training.measure(drafter, stream, context=64, tokens=512)
    for step in range(40):
        windows = [stream[at : at + 41] for at in range(step, step + 80, 10)]
        loss = training.loss(drafter, states_of(target, torch.tensor(np.stack(windows))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = training.measure(drafter, stream, context=64, tokens=512)
    assert before is not None and after is not None
    assert after.tokens_per_round > before.tokens_per_round + 0.5
    assert after.drafts == 3
