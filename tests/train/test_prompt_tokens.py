"""Prompt tokens learn what the target says further on, and are measured in the steps that serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from copying import copying, periodic
from helpers import assert_close, feed, randomise, tiny_model

from linspec.checkpoints.hub import load_model
from linspec.decoding.step import StepInput
from linspec.drafters.ppd import PromptsConfig, PromptTokens
from linspec.drafters.saved import load_drafter
from linspec.errors import ConfigError, InputError
from linspec.models.decoder import Decoder
from linspec.train.drafters import TRAININGS, DrafterConfig, train_drafter
from linspec.train.drafters.chains import hidden_behind
from linspec.train.drafters.ppd import calibrate, prompts_loss
from linspec.train.drafters.states import states_of

SHORT = DrafterConfig(
    tokens=40 * 128, context=16, batch_tokens=128, calibration_tokens=256, precision="float32"
)


def random_prompts(model: Decoder, count: int = 3) -> PromptTokens:
    shape = PromptsConfig(
        width=model.config.width, vocab_size=model.config.vocab_size, prompts=count
    )
    return randomise(PromptTokens(shape), 4).to(model.dtype)


@pytest.mark.parametrize("mixer", ["softmax", "aug", "gla", "window"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_training_sees_what_serving_computes(mixer: str, positions: str) -> None:
    model, ids = tiny_model(mixer, positions=positions), torch.randint(0, 31, (2, 9))
    given = torch.randn(3, 16, dtype=torch.float64)
    hidden, state = hidden_behind(model, ids, given), model.new_state(2)
    for slot in (0, 1):
        feed(model, state, ids[slot].tolist(), slot)
        served = model.step([StepInput(slot, [0, 0, 0], embeddings=given)], state)
        assert_close(hidden[slot], served.hidden)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_calibration_equals_a_brute_force_count(mixer: str) -> None:
    model, stream = tiny_model(mixer), np.random.default_rng(0).integers(0, 31, 95)
    prompts = random_prompts(model)
    counted = calibrate(model, prompts, stream, context=24, tokens=72)
    for i in range(3):
        hits, seen = np.zeros(10), 0
        for start in (0, 24, 48):
            window = torch.from_numpy(stream[start : start + 24])[None]
            chosen = model(window).argmax(-1)[0]
            for t in range(24 - i - 1):
                hidden = hidden_behind(model, window[:, : t + 1], prompts.embeddings)
                order = model.head(hidden)[0, i].argsort(descending=True)[:10].tolist()
                seen += 1
                if int(chosen[t + i + 1]) in order:
                    hits[order.index(int(chosen[t + i + 1]))] += 1
        assert hits.sum() > 0
        assert counted[i] == pytest.approx(hits / seen, abs=1e-5)


def test_prompts_learn_and_the_target_does_not() -> None:
    """Noise that hides the copied token is unlearnt: the loss falls by more than 30%."""
    model = copying(layers=1)
    training = TRAININGS.build("ppd")
    stream = np.array(periodic(400))
    prompts = training.make(model, stream, seed=0)
    with torch.no_grad():
        prompts.embeddings.normal_(generator=torch.Generator().manual_seed(0)).mul_(8)
    batch = torch.from_numpy(np.stack([stream[start : start + 25] for start in range(6)]))
    optimizer, losses = torch.optim.Adam(prompts.parameters(), 0.3), []
    for _ in range(40):
        loss = training.loss(prompts, states_of(model, batch))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert all(each.grad is None for each in model.parameters())
    assert losses[-1] < 0.7 * losses[0]
    training.measure(prompts, stream, context=24, tokens=96)
    assert min(row[0] for row in prompts.accuracies) > 0.6


def test_the_loss_is_the_weighted_divergence(tiny_teacher: Callable[..., Decoder]) -> None:
    model = tiny_teacher()
    prompts, batch = random_prompts(model, 2), torch.randint(0, 290, (3, 6))
    with torch.no_grad():
        found, expected = prompts_loss(prompts, states_of(model, batch), 0.5), []
        logs = model(batch[:, :-1]).log_softmax(-1)
        for cut in range(1, 4):
            hidden = hidden_behind(model, batch[:, :cut], prompts.embeddings)
            own = model.head(hidden).log_softmax(-1)
            each = [
                sum(
                    (logs[b, cut + i].exp() * (logs[b, cut + i] - own[b, i])).sum()
                    for b in range(3)
                )
                for i in range(2)
            ]
            expected.append(float(each[0] / 3 + 0.5 * each[1] / 3) / 2)
    assert min(abs(float(found) - each) for each in expected) < 1e-5


def test_trained_prompts_load_with_their_accuracies(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    out = train_drafter(
        teacher_dir, tmp_path / "d", kind="ppd:prompts=2", data=[corpus], config=SHORT
    )
    prompts = load_drafter(out, load_model(teacher_dir), PromptTokens)
    assert prompts.config.prompts == 2 and prompts.embeddings.abs().sum() > 0
    assert [len(row) for row in prompts.accuracies] == [10, 10]
    assert json.loads((out / "drafter.json").read_text())["kind"] == "ppd"
    with pytest.raises(ConfigError, match="prompts must be 1 or more"):
        train_drafter(teacher_dir, tmp_path / "e", kind="ppd:prompts=0", data=[corpus])
    with pytest.raises(InputError, match="drafter of kind 'ppd'"):
        train_drafter(
            teacher_dir, tmp_path / "e", kind="ppd:prompts=16", data=[corpus], config=SHORT
        )
