"""The recipe of a linearization: made in one place, checked once, written down; old calls work."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from linspec.checkpoints.hub import load_any_config, load_encoder
from linspec.cli import app
from linspec.cli.linearize import Mixing
from linspec.errors import ConfigError, InputError, LinspecError, WrongType
from linspec.evaluate.embeddings import compare_sources
from linspec.mixers.config import MixerConfig
from linspec.train.encoder import linearize_encoder
from linspec.train.encoder_training import EncoderTraining
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.linearize_recipe import LinearizeRecipe

SHORT: dict[str, Any] = {
    "tokens": 4 * 128,
    "transfer_share": 0.5,
    "context": 32,
    "batch_tokens": 128,
    "lr": 3e-3,
    "warmup": 2,
}


# ---- the object


def test_options_are_those_of_the_recipe_or_of_its_training() -> None:
    recipe = LinearizeRecipe.of(mixer="local", exact_tokens=64, tokens=1000, lr=0.5)
    assert (recipe.mixer, recipe.exact_tokens) == ("local", 64)
    assert recipe.training == LinearizeConfig(tokens=1000, lr=0.5)
    again = LinearizeRecipe.of(recipe, mixer="aug", lr=0.25)
    assert (again.mixer, again.exact_tokens) == ("aug", 64)
    assert again.training == LinearizeConfig(tokens=1000, lr=0.25)
    whole = LinearizeRecipe.of(config=LinearizeConfig(tokens=7), seed=3)
    assert whole.config == LinearizeConfig(tokens=7, seed=3)
    assert LinearizeRecipe.of(config=None) == LinearizeRecipe()


def test_sizes_of_the_command_are_those_of_the_recipe() -> None:
    given = Mixing(span="2,4", keep_softmax="1", features=3, mixer="rfa").given()
    assert given == {
        "span": (2, 4),
        "keep_softmax": (1,),
        "features": 3,
        "mixer": "rfa",
    }
    assert LinearizeRecipe(**given).span == (2, 4)
    assert LinearizeRecipe(**Mixing(span="2").given()).span == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mixers": "aug"}, WrongType, "no option 'mixers'.*did you mean 'mixer'"),
        ({"mixer": "agu"}, ConfigError, "did you mean 'aug'"),
        ({"exact_tokens": 0}, ConfigError, "exact_tokens must be 1 or more, got 0"),
        ({"softmax_layers": -1}, ConfigError, "softmax_layers must be 0 or more"),
        ({"data": ["/nowhere"]}, InputError, "nowhere does not exist"),
        ({"tokens": 0}, ConfigError, "tokens must be 1 or more"),
        ({"config": EncoderTraining(), "kl_weight": 1}, ConfigError, "has no kl_weight"),
    ],
)
def test_a_recipe_is_checked_when_it_is_made(
    options: dict[str, Any], error: type[LinspecError], message: str
) -> None:
    with pytest.raises(error, match=message):
        LinearizeRecipe.of(**options)


def test_the_old_name_of_exact_tokens_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="rows is now called exact_tokens"):
        assert LinearizeRecipe.of(rows=128) == LinearizeRecipe(exact_tokens=128)


def test_a_recipe_is_written_as_it_was_asked_for(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    recipe = LinearizeRecipe.of(
        mixer=MixerConfig(name="aug", group=8, taps=4), data=[corpus], keep_softmax=(1,), **SHORT
    )
    out = linearize(teacher_dir, tmp_path / "s", recipe)
    record = json.loads((out / "linearize.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(recipe.to_json()))
    assert record["recipe"]["config"] == SHORT
    assert record["recipe"]["mixer"] == MixerConfig(name="aug", group=8, taps=4).recorded()
    assert record["format_version"] == "0.2"
    # the plan is the recipe for this teacher, completed
    assert record["plan"]["config"]["kl_weight"] == 1.0
    assert [mixer["name"] for mixer in record["plan"]["mixers"]] == ["aug", "softmax"]


# ---- encoders go through the same function


@pytest.fixture
def bert_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(shape).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def paragraphs(tmp_path: Path) -> Path:
    file = tmp_path / "paragraphs.txt"
    told = "the old fox sees a red dog near my big house and runs away from it"
    file.write_text("".join(f"{i} {told[i % 9 :]} {told}\n" for i in range(100)))
    return file


def test_an_encoder_is_linearized_by_the_same_call(
    bert_dir: Path, paragraphs: Path, tmp_path: Path
) -> None:
    out = linearize(bert_dir, tmp_path / "s", data=[paragraphs], taps=4, keep_softmax=(1,), **SHORT)
    mixers = load_any_config(out).mixers
    assert mixers == (
        MixerConfig(name="aug", group=32, span=2, kernel="softmax", taps=4),
        MixerConfig(),
    )
    record = json.loads((out / "linearize.json").read_text())
    assert record["plan"]["config"] == asdict(
        EncoderTraining(transfer_steps=2, finetune_steps=2, rows=4, context=32, lr=3e-3, warmup=2)
    )
    assert set(record["losses"]) == {"transfer", "finetune"}
    before, after = load_encoder(bert_dir), load_encoder(out)
    assert not torch.equal(
        before.encoder.layers[0].mlp.up.weight, after.encoder.layers[0].mlp.up.weight
    )
    # what is done is done
    again = linearize(
        bert_dir, tmp_path / "s", data=[paragraphs], taps=4, keep_softmax=(1,), resume=True, **SHORT
    )
    assert again == out


def test_encoders_go_through_the_verbs(bert_dir: Path, paragraphs: Path, tmp_path: Path) -> None:
    def run(*args: object) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*map(str, args), "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    data, out = ("--data", paragraphs), tmp_path / "s"
    sizes = ("--tokens", 512, "--context", 32, "--batch-tokens", 128, "--span", "1")
    assert run("linearize", bert_dir, "--out", out, *data, *sizes, "--taps", 4) == {"out": str(out)}
    assert {mixer.span for mixer in load_any_config(out).mixers} == {1}
    refused = CliRunner().invoke(app, ["eval", str(out), *map(str, data)])
    assert refused.exit_code == 1 and "`linspec eval embeddings` measures it" in refused.stderr
    limits = ("--texts", 3, "--context", 24)
    found = run("eval", "embeddings", bert_dir, out, *data, *limits)
    assert found == compare_sources(bert_dir, out, [paragraphs], count=3, context=24).to_json()
    assert found["texts"] == 3 and 0.5 < found["cosine"] < 1
    itself = run("eval", "embeddings", bert_dir, bert_dir, *data, *limits)
    assert itself["cosine"] == pytest.approx(1, abs=1e-5)
    rounded = run("eval", "embeddings", bert_dir, bert_dir, *data, *limits, "--quantize", 4)
    assert 0.5 < rounded["cosine"] < itself["cosine"]


def test_encoders_of_two_tokenizers_are_not_compared(
    bert_dir: Path, paragraphs: Path, tmp_path: Path
) -> None:
    """The teacher's ids were read by both, which was an IndexError or silently wrong."""
    other = Path(shutil.copytree(bert_dir, tmp_path / "other"))
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(ConfigError, match="numbers text otherwise than the model"):
        compare_sources(bert_dir, other, [paragraphs], count=3, context=24)


def test_the_old_function_for_encoders_does_what_it_did(
    bert_dir: Path, paragraphs: Path, tmp_path: Path
) -> None:
    config = EncoderTraining(transfer_steps=1, finetune_steps=1, rows=2, context=40)
    out = linearize_encoder(bert_dir, tmp_path / "s", data=[paragraphs], config=config)
    assert {mixer.group for mixer in load_any_config(out).mixers} == {64}
    assert json.loads((out / "linearize.json").read_text())["plan"]["config"] == asdict(config)


def test_steps_of_an_encoder_follow_from_tokens() -> None:
    assert LinearizeRecipe().encoder_training == EncoderTraining()
    given = LinearizeRecipe.of(tokens=64_000, context=64, batch_tokens=640, transfer_share=0.25)
    training = given.encoder_training
    assert (training.rows, training.transfer_steps, training.finetune_steps) == (10, 25, 75)
    # settings that are not the default count as given
    whole = LinearizeRecipe(config=LinearizeConfig(seed=3)).encoder_training
    assert whole == EncoderTraining(seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": 2.0}, "an encoder predicts no tokens, so its training has no kl_weight"),
        ({"recall_share": 0.5, "lora_rank": 2}, "has no lora_rank, recall_share"),
        ({"compile": "on"}, "has no compile"),
        ({"exact_tokens": 64}, "leave out exact_tokens"),
        ({"softmax_layers": 1}, "leave out exact_tokens and softmax_layers"),
        ({"context": 65}, "beyond the encoder's 64 positions"),
        ({"span": (2,), "taps": 4, "context": 32}, "1 spans given for 2 layers"),
    ],
)
def test_what_an_encoder_cannot_use_is_named(
    bert_dir: Path, paragraphs: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        linearize(bert_dir, tmp_path / "s", data=[paragraphs], **options)
    assert not (tmp_path / "s").exists()


def test_training_of_an_encoder_is_refused_for_what_generates(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    with pytest.raises(ConfigError, match="this source generates text"):
        linearize(teacher_dir, tmp_path / "s", data=[corpus], config=EncoderTraining())
