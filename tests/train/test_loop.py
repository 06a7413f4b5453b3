"""The training loop: it learns, resumes exactly, and loses nothing when something breaks."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from linspec.errors import CheckpointError, ConfigError, TrainingError
from linspec.train import loop
from linspec.train.loop import TrainConfig, Trainer, make_optimizers, mean_loss, schedule

SHORT = TrainConfig(
    steps=12, lr=1e-2, warmup=2, precision="float32", compile="off", save_every=0.0, log_every=1
)


def problem() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def trainer(folder: Path, model: nn.Module, config: TrainConfig = SHORT, **hooks: Any) -> Trainer:
    def loss(x: torch.Tensor) -> torch.Tensor:
        if "before" in hooks:
            hooks["before"](x)
        return (model(x) - x.flip(1)).square().mean()

    return Trainer(model, loss, batch, config, folder, label="test")


class Stop(Exception):
    """Stands for a kill at a given step."""


def stop_after(steps: int) -> Any:
    left = [steps]

    def before(x: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return before


def test_loss_goes_down(tmp_path: Path) -> None:
    config = TrainConfig(steps=60, lr=3e-2, precision="float32", log_every=1)
    log = trainer(tmp_path / "s", problem(), config).run()
    assert mean_loss(log, 5) < 0.7 * log[0]["loss"]
    assert log[-1]["step"] == 60 and log[-1]["tokens"] == 60 * 6 * 3


@pytest.mark.parametrize("muon", [None, 1e-2])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    tmp_path: Path, muon: float | None
) -> None:
    config = TrainConfig(
        steps=12, lr=1e-2, muon_lr=muon, precision="float32", compile="off", save_every=0.0
    )
    whole = problem()
    trainer(tmp_path / "whole", whole, config).run()
    cut = problem()
    with pytest.raises(Stop):
        trainer(tmp_path / "cut", cut, config, before=stop_after(5)).run()
    resumed = problem()
    again = trainer(tmp_path / "cut", resumed, config)
    again.run(resume=True)
    assert again.step == 12
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, lr=1e-2, precision="float32", save_every=1e9)
    with pytest.raises(Stop):
        trainer(tmp_path / "s", problem(), config, before=stop_after(2)).run()
    again = trainer(tmp_path / "s", problem(), config)
    again.load()
    assert again.step == 0


def test_finished_run_resumes_to_itself_without_a_step(tmp_path: Path) -> None:
    trainer(tmp_path / "s", problem()).run()
    log = trainer(tmp_path / "s", problem(), before=stop_after(0)).run(resume=True)
    assert log[-1]["step"] == 12


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        trainer(tmp_path / "s", problem()).run(resume=True)


def test_state_of_another_model_is_an_error(tmp_path: Path) -> None:
    trainer(tmp_path / "s", problem()).run()
    with pytest.raises(TrainingError, match="another model"):
        trainer(tmp_path / "s", nn.Linear(4, 4)).run(resume=True)


def test_nan_loss_stops_with_the_last_good_state_on_disk(tmp_path: Path) -> None:
    model, calls = problem(), []

    def poison(x: torch.Tensor) -> None:
        calls.append(x)
        if len(calls) == 6:
            x.fill_(float("nan"))

    with pytest.raises(TrainingError, match="nan at step 5"):
        trainer(tmp_path / "s", model, before=poison).run()
    good = trainer(tmp_path / "s", problem())
    good.load()
    assert good.step == 5
    assert all(torch.isfinite(p).all() for p in good.named.values())


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    config = TrainConfig(
        steps=12, lr=1e-2, warmup=2, precision="float32", compile="off", save_every=1e9
    )
    calls = []

    def press(x: torch.Tensor) -> None:
        calls.append(x)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "s", problem(), config, before=press).run()
    assert signal.getsignal(signal.SIGINT) is before
    resumed, whole = problem(), problem()
    again = trainer(tmp_path / "s", resumed, config)
    again.load()
    assert again.step == 4
    again.run(resume=True)
    trainer(tmp_path / "w", whole, config).run()
    assert torch.equal(resumed[0].weight, whole[0].weight)


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def press(x: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run = trainer(tmp_path / "s", problem(), before=press)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.step == 0


def test_full_disk_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, saves = trainer(tmp_path / "s", problem()), []
    write = loop.save_file

    def save_file(tensors: Any, path: Path) -> None:
        saves.append(path)
        if len(saves) > 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(loop, "save_file", save_file)
    with pytest.raises(CheckpointError, match="No space left"):
        run.run()
    monkeypatch.setattr(loop, "save_file", write)
    assert os.listdir(tmp_path) == ["s"]
    again = trainer(tmp_path / "s", problem())
    again.run(resume=True)
    assert again.step == 12


def test_frozen_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        trainer(tmp_path / "s", problem().requires_grad_(False))


def test_schedule_rises_stays_and_falls_to_zero() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.5)
    factors = [schedule(step, config) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[50] == 1.0
    assert factors[75] == 0.5 and factors[100] == 0.0


def test_named_weights_get_their_own_rate_and_never_muon() -> None:
    named = {
        "blocks.0.mixer.q.weight": nn.Parameter(torch.ones(2, 2)),
        "blocks.0.mixer.taps": nn.Parameter(torch.ones(2, 4)),
        "blocks.0.mixer.alpha": nn.Parameter(torch.ones(())),
        "embed.weight": nn.Parameter(torch.ones(3, 2)),
    }
    config = TrainConfig(steps=1, lr=0.1, muon_lr=0.2, lr_factors=(("taps", 5.0), ("alpha", 3.0)))
    rates = {
        id(weight): group["lr"]
        for optimizer in make_optimizers(named, config)
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert [rates[id(w)] for w in named.values()] == pytest.approx([0.2, 0.5, 0.3, 0.1])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="steps"):
        TrainConfig(steps=0, lr=1.0)
    with pytest.raises(ConfigError, match="precision"):
        TrainConfig(steps=1, lr=1.0, precision="fp8")
    with pytest.raises(ConfigError, match="compile must be auto, on or off"):
        TrainConfig(steps=1, lr=1.0, compile="yes")


def test_long_runs_are_compiled_only_where_there_is_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    config = TrainConfig(steps=8, lr=1e-2, precision="float32")
    trainer(tmp_path / "short", problem(), config).run()
    assert not compiled
    monkeypatch.setattr(loop, "_COMPILE_PAYS_AFTER", 0.0)
    with caplog.at_level(logging.INFO, "linspec"):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        trainer(tmp_path / "none", problem(), config).run()
    assert not compiled and caplog.text.count("no C++ compiler") == 1
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    trainer(tmp_path / "long", problem(), config).run()
    assert len(compiled) == 1


def test_compile_off_never_compiles_and_on_does_from_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def compile_(f: Any, **options: Any) -> Any:
        def counted(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return f(x)

        return counted

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(loop, "_COMPILE_PAYS_AFTER", 0.0)
    config = TrainConfig(steps=8, lr=1e-2, precision="float32", compile="off")
    assert not any(e["compiled"] for e in trainer(tmp_path / "off", problem(), config).run())
    assert not calls
    log = trainer(tmp_path / "on", problem(), replace(config, compile="on", log_every=1)).run()
    # once more than there are steps: the first batch is checked
    assert len(calls) == 9 and all(entry["compiled"] for entry in log)


def test_state_says_how_it_was_made(tmp_path: Path) -> None:
    trainer(tmp_path / "s", problem()).run()
    meta = json.loads((tmp_path / "s" / "state.json").read_text())
    assert meta["step"] == 12 and meta["config"]["lr"] == SHORT.lr
