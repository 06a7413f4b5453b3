"""Pretraining: the recipe runs, learns, resumes and saves a model that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from linspec.checkpoints.hub import load_config, load_model, load_tokenizer
from linspec.decoding.sampling import SamplingParams
from linspec.errors import CheckpointError, ConfigError, TrainingError
from linspec.llm import LLM
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.train import pretrain as module
from linspec.train.loop import TrainConfig
from linspec.train.pretrain import RECIPES, Recipe, context_at, pretrain
from linspec.utils.files import exclusive


@pytest.fixture(autouse=True)
def tiny_recipe(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Callable[..., Decoder]
) -> Recipe:
    recipe = Recipe(
        model=tiny_teacher(290).config,
        train=TrainConfig(
            steps=20,
            lr=1e-2,
            warmup=2,
            precision="float32",
            compile="off",
            save_every=0.0,
            log_every=1,
        ),
        sources=(str(corpus),),
        tokens_per_step=256,
        stages=((0.5, 32), (0.5, 64)),
    )
    monkeypatch.setattr(module, "RECIPES", {"tiny": lambda: recipe})
    return recipe


def test_pretraining_learns_and_saves(tmp_path: Path) -> None:
    out = pretrain(tmp_path / "m", recipe="tiny")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["tokens"] == 20 * 256
    model, tokenizer = load_model(out), load_tokenizer(out)
    ids = torch.tensor([tokenizer.encode("the old fox")])
    assert model(ids).shape == (1, ids.shape[1], 290)


def test_killed_pretraining_resumes_bit_for_bit(
    tmp_path: Path,
    killed_before: Callable[[int], AbstractContextManager[None]],
    assert_same: Callable[..., None],
) -> None:
    whole = pretrain(tmp_path / "whole", recipe="tiny")
    with pytest.raises(RuntimeError, match="killed"), killed_before(11):
        pretrain(tmp_path / "cut", recipe="tiny")
    cut = pretrain(tmp_path / "cut", recipe="tiny", resume=True)
    assert_same(load_model(whole), load_model(cut))


def test_resuming_with_other_settings_trained_another_model_and_training_stayed_behind(
    tmp_path: Path, no_training: Callable[[], AbstractContextManager[None]]
) -> None:
    out = pretrain(tmp_path / "m", recipe="tiny", steps=2)
    assert not (out / "training").exists()
    with pytest.raises(TrainingError, match="started with recipe"):
        pretrain(out, recipe="tiny", steps=3, resume=True)
    with pytest.raises(TrainingError, match="nothing to resume"):
        pretrain(tmp_path / "n", recipe="tiny", steps=3, resume=True)
    with no_training():
        assert pretrain(out, recipe="tiny", steps=2, resume=True) == out
    with pytest.raises(ConfigError, match="give --overwrite"):
        pretrain(out, recipe="tiny", steps=2)


def test_a_base_is_trained_on_with_its_tokenizer_and_more_positions(
    tmp_path: Path, tiny_recipe: Recipe, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pretrain(tmp_path / "base", recipe="tiny", steps=1)
    longer = replace(
        tiny_recipe,
        base=str(base),
        model=replace(load_config(base), max_positions=256),
        recall_share=0.5,
        train=replace(tiny_recipe.train, lr=1e-6, warmup=0),
    )
    monkeypatch.setattr(module, "RECIPES", {"longer": lambda: longer})
    (tmp_path / "book.txt").write_text(text)
    out = pretrain(tmp_path / "m", recipe="longer", steps=1, data=[str(tmp_path / "book.txt")])
    model, start = load_model(out), load_model(base)
    assert model.config.max_positions == 256
    assert load_tokenizer(out).get_vocab() == load_tokenizer(base).get_vocab()
    for name, weight in start.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-2, atol=1e-4)


def test_the_recall_recipe_keeps_the_shape_of_its_base() -> None:
    recipe = RECIPES["recall"]()
    assert recipe.model == replace(load_config(recipe.base), max_positions=4096)
    assert recipe.stages[-1][1] == recipe.model.max_positions


def test_an_autoregressive_base_becomes_a_diffusion_model_with_a_mask_of_its_own(
    tmp_path: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pretrain(tmp_path / "base", recipe="tiny", steps=1)
    known = RECIPES["embedded-diffusion"]()
    assert known.model.vocab_size == load_config(known.base).vocab_size + 1
    shape = {each.name: getattr(load_config(base), each.name) for each in fields(DecoderConfig)}
    filling = replace(
        tiny_recipe,
        base=str(base),
        model=DiffusionConfig(**shape | {"vocab_size": 291}, mask_id=290, logit_shift=1),
    )
    monkeypatch.setattr(module, "RECIPES", {"filling": lambda: filling})
    out = pretrain(tmp_path / "m", recipe="filling")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert load_tokenizer(out).mask_token_id == 290
    answer = LLM(out).generate("the old", SamplingParams(max_tokens=8))[0]
    assert len(answer.token_ids) <= 8 and "<|mask|>" not in answer.text


def test_output_in_use(tmp_path: Path) -> None:
    with exclusive(tmp_path / "m"), pytest.raises(CheckpointError, match="in use"):
        pretrain(tmp_path / "m", recipe="tiny")


def test_unknown_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'x'; known: tiny"):
        pretrain(tmp_path / "m", recipe="x")


def test_context_grows_by_stage(tiny_recipe: Recipe) -> None:
    assert [context_at(step, tiny_recipe) for step in (0, 9, 10, 19)] == [32, 32, 64, 64]
    longer = replace(tiny_recipe, stages=((1.0, 32),))
    assert context_at(20, longer) == 32


def test_embedded_recipe_is_of_the_promised_size() -> None:
    model = RECIPES["embedded"]().model
    with torch.device("meta"):
        decoder = Decoder(model)
    assert 4e6 < sum(p.numel() for p in decoder.parameters()) < 6e6
