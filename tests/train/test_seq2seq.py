"""Linearizing an encoder-decoder: both sides learn, and its drafts stay lossless."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from linspec.checkpoints.hub import load_causal_model, save_model
from linspec.cli import app
from linspec.errors import ConfigError
from linspec.evaluate.continuations import continue_source
from linspec.evaluate.lossless import verify
from linspec.mixers.config import MixerConfig
from linspec.models.t5 import T5
from linspec.train.finetune import finetune_loss
from linspec.train.linearize import continue_training, linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.objective import next_tokens
from linspec.train.pretrain import initialize
from linspec.train.student import with_mixers
from linspec.train.transfer import Transfer
from studies.linearized_llm.seq2seq import tiny_t5

SHORT = LinearizeConfig(
    tokens=8 * 128,
    transfer_share=0.5,
    context=64,
    batch_tokens=128,
    lr=3e-3,
    transfer_lr=1e-2,
    warmup=2,
    precision="float32",
)
AUG = MixerConfig(name="aug", group=8, taps=4)


def linearized(source: Path, out: Path, corpus: Path, **options: Any) -> Path:
    options = {"mixer": AUG, "config": SHORT, "data": [corpus]} | options
    return linearize(source, out, **options)


def ids(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 250, (rows, 33), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    shape = tiny_t5(len(tokenizer), 0)
    small = replace(
        shape,
        encoder=replace(shape.encoder, width=32, layers=2, mixers=()),
        decoder=replace(shape.decoder, width=32, layers=1, mixers=()),
    )
    model = T5(small)
    initialize(model, 2, torch.Generator().manual_seed(0))
    return save_model(model, tokenizer, tmp_path_factory.mktemp("models") / "t5")


def test_a_t5_is_linearized_on_both_sides_and_drafts_stay_lossless(
    t5_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    out = linearized(t5_dir, tmp_path / "s", corpus, keep_softmax=(1,))
    student, teacher = load_causal_model(out), load_causal_model(t5_dir)
    assert isinstance(student, T5) and isinstance(teacher, T5)
    # the layers of the encoder come first
    assert student.config.encoder.mixers == (AUG, MixerConfig())
    assert student.config.decoder.mixers == (AUG,)
    for before, after in ((teacher.encoder, student.encoder), (teacher.decoder, student.decoder)):
        mixer = after.layers[0].mixer
        assert mixer.taps.abs().sum() > 0
        assert not torch.equal(before.layers[0].mixer.q.weight, mixer.q.weight)
    record = json.loads((out / "linearize.json").read_text())
    assert set(record["losses"]) == {"transfer", "finetune"}
    found = verify(str(out), "prompt-lookup", prompts=2, tokens=24, draws=0, data=[str(corpus)])
    assert found.lossless_greedy


def test_every_part_of_a_t5_student_learns(t5_dir: Path) -> None:
    teacher = load_causal_model(t5_dir)
    student = with_mixers(teacher, (AUG,) * 3)
    with Transfer(teacher, student, range(3)) as transfer:
        loss = transfer.loss(ids())
        loss.backward()
        assert loss.isfinite()
        for name, weight in transfer.parameters().named_parameters():
            assert weight.grad is not None, name
    student.zero_grad()
    finetune_loss(student, ids(), teacher, kl_weight=1.0).backward()
    assert all(weight.grad is not None for weight in student.parameters())


def test_a_t5_predicts_the_second_half_of_a_window(t5_dir: Path) -> None:
    model, window = load_causal_model(t5_dir), ids(rows=1)
    with torch.no_grad():
        states, output, wanted = next_tokens(model, window)
        assert wanted.tolist() == window[:, 17:].tolist()
        # each target token is predicted from the source and the tokens before it alone
        given = torch.cat((torch.zeros(1, 1).long(), window[:, 17:25]), dim=1)
        logits = states[0] @ output.weight.T
        torch.testing.assert_close(logits[:9], model(window[:, :17], given)[0])


def test_the_control_of_a_t5_is_an_ordinary_t5(t5_dir: Path, tmp_path: Path, corpus: Path) -> None:
    out = continue_training(t5_dir, tmp_path / "c", data=[corpus], config=SHORT)
    assert json.loads((out / "config.json").read_text())["model_type"] == "t5"


def test_reach_and_adapters_work_for_a_t5(t5_dir: Path, tmp_path: Path, corpus: Path) -> None:
    config = replace(SHORT, lora_rank=2, lr=None, transfer_share=None)
    out = linearized(
        t5_dir, tmp_path / "s", corpus, mixer="local", group=8, exact_tokens=16, config=config
    )
    student = load_causal_model(out)
    # a mean of two groups a layer, spent where they are needed
    assert sum(mixer.span for mixer in student.config.mixers) <= 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "gla"}, "'gla' has no bidirectional form and fits decoders only"),
        ({"keep_softmax": (3,)}, r"no layer 3: layers are 0\.\.2"),
        ({"mixer": "aug", "taps": SHORT.context}, f"the {SHORT.context // 2} tokens of a training"),
        ({"config": replace(SHORT, context=1)}, "no source and target; give 2 or more"),
    ],
)
def test_what_does_not_fit_a_t5_is_refused(
    t5_dir: Path, tmp_path: Path, corpus: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        linearized(t5_dir, tmp_path / "s", corpus, **options)


def test_continuations_are_scored_by_a_verb(t5_dir: Path, corpus: Path) -> None:
    args = ("--data", corpus, "--context", "16", "--limit-bytes", "900", "--json")
    result = CliRunner().invoke(app, ["eval", "continuations", str(t5_dir), *map(str, args)])
    assert result.exit_code == 0, result.output
    expected = continue_source(t5_dir, [corpus], context=16, limit_bytes=900)
    assert json.loads(result.stdout) == expected.to_json()
    assert 0 < expected.bytes <= 900
    refused = CliRunner().invoke(app, ["eval", str(t5_dir), "--data", str(corpus)])
    assert refused.exit_code == 1 and "`linspec eval continuations`" in refused.stderr
