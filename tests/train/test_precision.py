"""Training in bfloat16: float32 weights and moments, gradients near those of float32, exact resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from linspec.cli import app
from linspec.errors import ConfigError, TrainingError
from linspec.models.decoder import Decoder
from linspec.train import precision
from linspec.train.loop import TrainConfig, Trainer
from linspec.train.precision import check_precision, computed_in
from linspec.train.pretrain import next_token_loss

NARROW = TrainConfig(
    steps=12, lr=1e-2, warmup=2, precision="bf16", compile="off", save_every=0.0, log_every=1
)
Teacher = Callable[..., Decoder]


class Stop(Exception):
    """Stands for a kill."""


def batch(step: int, stop: int | None = None) -> torch.Tensor:
    if step == stop:
        raise Stop
    return torch.randint(40, (4, 17), generator=torch.Generator().manual_seed(step % 2))


def trainer(
    model: Decoder, folder: Path, config: TrainConfig = NARROW, stop: int | None = None
) -> Trainer:
    loss = partial(next_token_loss, model)
    return Trainer(model, loss, partial(batch, stop=stop), config, folder, label="test")


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_float16_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"precision {name} .* take bf16"):
        check_precision(name)
    found = CliRunner().invoke(app, ["pretrain", "--out", "x", "--precision", name])
    assert found.exit_code and "take bf16" in " ".join(found.output.split())


def test_auto_is_bfloat16_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert computed_in("auto", cuda) == "bf16" and computed_in("float32", cuda) == "float32"
    for fast, found in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(precision, "fast_bfloat16", lambda device, fast=fast: fast)
        assert computed_in("auto", cpu) == found
    assert computed_in("bf16", cpu) == "bf16"


def test_the_loss_falls_and_what_is_kept_is_float32(tiny_teacher: Teacher, tmp_path: Path) -> None:
    model = tiny_teacher()
    log = trainer(model, tmp_path / "s").run()
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    kept = load_file(tmp_path / "s" / "state.safetensors")
    assert {x.dtype for x in kept.values()} == {torch.float32}
    assert any(name.startswith("moment.") for name in kept)
    assert {x.dtype for x in model.parameters()} == {torch.float32}


def test_gradients_are_those_of_float32_up_to_rounding(tiny_teacher: Teacher) -> None:
    model, found = tiny_teacher(), []
    for narrow in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = next_token_loss(model, batch(0))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        assert loss.dtype == torch.float32
        slopes = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert {slope.dtype for slope in slopes} == {torch.float32}
        found.append(torch.cat([slope.flatten() for slope in slopes]))
    exact, rounded = found
    # bfloat16 keeps 8 bits: a share of 2^-8 at every product
    assert float((rounded - exact).norm()) < 0.05 * float(exact.norm())


def test_a_resumed_run_computes_as_it_began(tiny_teacher: Teacher, tmp_path: Path) -> None:
    whole, cut = tiny_teacher(), tiny_teacher()
    trainer(whole, tmp_path / "whole").run()
    with pytest.raises(Stop):
        trainer(cut, tmp_path / "cut", stop=5).run()
    resumed = tiny_teacher()
    trainer(resumed, tmp_path / "cut").run(resume=True)
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_another_precision_is_no_resuming(tiny_teacher: Teacher, tmp_path: Path) -> None:
    folder, wide = tmp_path / "s", replace(NARROW, precision="float32")
    with pytest.raises(Stop):
        trainer(tiny_teacher(), folder, stop=5).run()
    with pytest.raises(TrainingError, match="computed with precision bf16, .* is float32"):
        trainer(tiny_teacher(), folder, wide).run(resume=True)
    # an older state does not say
    meta = json.loads((folder / "state.json").read_text())
    del meta["precision"]
    (folder / "state.json").write_text(json.dumps(meta))
    assert trainer(tiny_teacher(), folder, wide).run(resume=True)[-1]["step"] == 12
