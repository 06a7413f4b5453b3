"""`linspec calibrate`: gates find the heads of `--attention lserve`, and a stopped run goes on as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_config
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from linspec import LLM
from linspec.checkpoints.hub import load_model, save_model
from linspec.cli import app
from linspec.errors import ConfigError, TrainingError
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.train import gates
from linspec.train.calibrate import CalibrateConfig, calibrate

SPEC = "lserve:budget=64,exact=1,window=64"
CONFIG = CalibrateConfig(steps=6, context=400, batch_tokens=400)


@pytest.fixture
def model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A random model, and a cache directory of the test's own."""
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    config = replace(
        tiny_config(MixerConfig(), MixerConfig(), max_positions=512),
        vocab_size=len(tokenizer),
        eos_ids=(0,),
    )
    return save_model(Decoder(config), tokenizer, tmp_path / "model")


def test_a_calibrated_model_is_served(model: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=f"`linspec calibrate {model} --attention {SPEC}`"):
        LLM(model, attention=SPEC)
    report = calibrate(model, SPEC, data=[corpus], config=CONFIG)
    assert report.out.parent == model / "calibration" and report.steps == 6
    assert sum(map(len, report.heads)) == 1
    llm = LLM(model, attention=SPEC)
    found = [list(mixer.exact_heads) for mixer in llm.model.config.mixers]
    assert found == report.heads
    with pytest.raises(ConfigError, match="--overwrite"):
        calibrate(model, SPEC, data=[corpus], config=CONFIG)
    calibrate(model, SPEC, data=[corpus], config=replace(CONFIG, steps=2), overwrite=True)


def test_other_weights_need_another_calibration(model: Path, corpus: Path) -> None:
    calibrate(model, SPEC, data=[corpus], config=replace(CONFIG, steps=1))
    changed = load_model(model)
    changed.norm.get_parameter("weight").data.mul_(1.5)
    save_model(changed, None, model.parent / "other")
    for name in ("model.safetensors", "checksums.json"):
        (model.parent / "other" / name).replace(model / name)
    with pytest.raises(Exception, match="its weights or its configuration have changed"):
        LLM(model, attention=SPEC)


def test_a_stopped_run_ends_as_if_it_had_not_stopped(
    model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(model, SPEC, data=[corpus], config=CONFIG)
    expected = json.loads((whole.out / "calibration.json").read_text())
    step = gates._Training.step

    def stopping(self: gates._Training, needles: object) -> float:
        if self.steps == 3:
            raise KeyboardInterrupt
        return step(self, needles)  # type: ignore[arg-type]

    monkeypatch.setattr(gates._Training, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, SPEC, data=[corpus], config=CONFIG, overwrite=True)
    monkeypatch.setattr(gates._Training, "step", step)
    with pytest.raises(TrainingError, match="steps"):
        calibrate(model, SPEC, data=[corpus], config=replace(CONFIG, steps=9), resume=True)
    calibrate(model, SPEC, data=[corpus], config=CONFIG, resume=True)
    assert json.loads((whole.out / "calibration.json").read_text()) == expected


def test_a_budget_of_seconds_takes_the_gates_as_they_are(model: Path, corpus: Path) -> None:
    report = calibrate(model, SPEC, data=[corpus], config=replace(CONFIG, seconds=1e-6))
    assert report.steps <= 1 and not report.reached and sum(map(len, report.heads)) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pages:budget=512", "attention 'pages' needs no calibration"),
        ("lserve:exact=layers:1", "names the heads already"),
        ("lserve:exact=9", "exact heads must be 1 to 3"),
        ("aug", "attention is one of"),
    ],
)
def test_what_cannot_be_calibrated_is_named(model: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(model, spec, config=CONFIG)


def test_texts_longer_than_the_model_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="beyond the 512 positions of this model"):
        calibrate(model, SPEC, config=replace(CONFIG, context=1024))


def test_by_default_texts_are_as_long_as_the_model_reads(model: Path, corpus: Path) -> None:
    """The command that `--attention lserve` names was refused on models of few positions."""
    short = replace(CONFIG, steps=1, context=None, batch_tokens=512)
    report = calibrate(model, SPEC, data=[corpus], config=short)
    plan = json.loads((report.out / "calibration.json").read_text())["plan"]
    assert plan["config"]["context"] == 512


def test_a_second_calibration_names_no_option_that_the_verb_lacks(
    model: Path, corpus: Path
) -> None:
    short = replace(CONFIG, steps=1)
    calibrate(model, SPEC, data=[corpus], config=short)
    with pytest.raises(ConfigError, match="--overwrite .* or move the directory away") as refused:
        calibrate(model, SPEC, data=[corpus], config=short)
    assert "--out" not in str(refused.value)


def test_the_verb_says_what_it_found(model: Path, corpus: Path) -> None:
    arguments = [
        "calibrate",
        str(model),
        "--attention",
        SPEC,
        "--data",
        str(corpus),
        "--steps",
        "2",
    ]
    result = CliRunner().invoke(app, [*arguments, "--context", "400", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["steps"] == 2 and report["out"].endswith("lserve-1-64-4")
