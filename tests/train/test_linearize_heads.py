"""`linspec linearize --exact-heads`: from a source to a directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_files import tiny
from helpers import assert_close, tiny_config
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from linspec.checkpoints.hub import load_model, save_model
from linspec.checkpoints.packages import PACKAGES
from linspec.cli import app
from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.mixers.exact_heads import read_exact
from linspec.models.decoder import Decoder
from linspec.train.linearize_heads import HeadsConfig, linearize_heads

CONFIG = HeadsConfig(
    gate_steps=3, tokens=2000, context=400, batch_tokens=800, precision="float32", lr=1e-3
)


@pytest.fixture
def teacher(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model whose layers are as wide as the ranks."""
    config = replace(
        tiny_config(MixerConfig(), MixerConfig(), max_positions=512),
        vocab_size=len(tokenizer),
        width=64,
        head_width=16,
        mlp_width=64,
        eos_ids=(0,),
    )
    return save_model(Decoder(config), tokenizer, tmp_path / "teacher")


def test_by_default_windows_are_as_long_as_the_model_reads(teacher: Path, tmp_path: Path) -> None:
    untrained = replace(CONFIG, gate_steps=1, tokens=0, context=None, batch_tokens=512)
    out = linearize_heads(teacher, tmp_path / "out", exact="1", config=untrained)
    assert json.loads((out / "linearize.json").read_text())["plan"]["config"]["context"] == 512


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1", 1),
        ("3", 3),
        ("50%", 2),
        ("all-linear", ((), ())),
        ("layers:1", ((), (0, 1))),
        ("layers:1,0", ((0, 1), (0, 1))),
    ],
)
def test_what_stays_exact_is_read(text: str, found: object) -> None:
    assert read_exact(text, tiny_config(MixerConfig(), MixerConfig())) == found


@pytest.mark.parametrize(
    "text", ["", "0", "4", "-1", "100%", "1.5", "x", "layers:", "layers:a", "0%"]
)
def test_what_cannot_stay_exact_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"1 to 3 of this model's 4, a share such as 12%"):
        read_exact(text, tiny_config(MixerConfig(), MixerConfig()))


@pytest.mark.parametrize("window", [0, -64, 63, 100])
def test_a_window_that_is_no_number_of_groups_is_named(window: int) -> None:
    with pytest.raises(ConfigError, match=f"multiple of the 64 tokens of a group, got {window}"):
        HeadsConfig(window=window)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no layer 2: layers are 0..1"):
        read_exact("layers:0,2", tiny_config(MixerConfig(), MixerConfig()))


def test_a_model_of_a_directory_becomes_a_model(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    out = linearize_heads(teacher, tmp_path / "out", exact="1", data=[corpus], config=CONFIG)
    model = load_model(out)
    exact = [mixer.exact_heads for mixer in model.config.mixers]
    plain = [mixer.name == "softmax" for mixer in model.config.mixers]
    width = model.config.kv_heads
    assert sum(map(len, exact)) + width * sum(plain) == 1
    record = json.loads((out / "linearize.json").read_text())
    assert record["plan"]["exact"] == "1" and record["tokens"]["match"] >= 1600
    # queries and keys are the teacher's
    before = load_model(teacher).state_dict()
    for name, weight in model.state_dict().items():
        if ".mixer.q." in name or ".mixer.k." in name or name.startswith("embed"):
            assert torch.equal(weight, before[name])
    again = linearize_heads(teacher, out, exact="1", data=[corpus], config=CONFIG, resume=True)
    assert again == out


def test_a_package_becomes_a_delta(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    path = PACKAGES["smollm2"].path
    path.parent.mkdir(parents=True)
    tiny("llama", path, "F32")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGES, "smollm2", replace(PACKAGES["smollm2"], sha256=sha256))
    out = tmp_path / "out"
    arguments = ["linearize", "smollm2", "--exact-heads", "layers:1", "--data", str(corpus)]
    arguments += ["--tokens", "600", "--context", "60", "--batch-tokens", "120", "--out", str(out)]
    arguments += ["--window", "192"]
    result = CliRunner().invoke(app, [*arguments, "--recall-share", "0"])
    assert result.exit_code == 0, result.output
    model = load_model(out)
    assert [mixer.name for mixer in model.config.mixers] == ["streaming", "softmax", "streaming"]
    assert [mixer.span * mixer.group for mixer in model.config.mixers[::2]] == [192, 192]
    ids = torch.arange(50)[None]
    with torch.no_grad():
        untouched = load_model("smollm2")(ids)
        # within reach of the window only the training moved it
        changed = model(ids)
    assert_close(changed, untouched, atol=0.5)
    assert not torch.equal(changed, untouched)
