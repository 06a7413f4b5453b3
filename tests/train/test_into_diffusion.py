"""A decoder becomes a masked-diffusion model: what is trained, what is written, and what is refused."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_files import tiny
from helpers import assert_close
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.delta import WEIGHTS
from linspec.checkpoints.description import describe
from linspec.checkpoints.hub import load_decoder, load_diffusion, load_model, load_tokenizer
from linspec.checkpoints.packages import PACKAGES
from linspec.errors import CheckpointError, ConfigError, TrainingError, UnsupportedModel
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.into_diffusion import (
    DiffusionTraining,
    into_diffusion,
    mask_of,
    without_causal_mask,
)
from linspec.train.low_rank import MATRICES, add_low_rank, add_row, factors, merge_low_rank

SHORT = DiffusionTraining(
    rank=4, steps=6, context=32, batch_tokens=128, lr=1e-2, precision="float32", save_every=0.0
)
IDS = torch.arange(2, 42)[None]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """smollm2 as a tiny model that is in the cache."""
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    path = PACKAGES["smollm2"].path
    path.parent.mkdir(parents=True)
    tiny("llama", path, "Q8_0", tie_word_embeddings=True)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGES, "smollm2", replace(PACKAGES["smollm2"], sha256=sha256))
    return path


@pytest.fixture
def made(base: Path, corpus: Path, tmp_path: Path) -> Path:
    config = replace(SHORT, mask="<tool>")
    return into_diffusion("smollm2", tmp_path / "out", data=[corpus], config=config)


def test_a_delta_of_the_package_is_written_that_loads_and_generates(made: Path) -> None:
    written = {path.name for path in made.iterdir()}
    assert {"checksums.json", "config.json", WEIGHTS, "pretrain.json"} < written
    assert not any(path.suffix == ".safetensors" for path in made.iterdir() if path.name != WEIGHTS)
    model = load_decoder(made)
    assert isinstance(model, MaskedDiffusion)
    assert model.config.logit_shift == 1
    assert model.config.decoder() == load_model("smollm2").config
    assert model.config.mask_id == load_tokenizer(made).convert_tokens_to_ids("<tool>")
    facts = describe(made)
    assert facts["format"] == "delta 1 of smollm2" and facts["decodes_by"] == "masked diffusion"
    assert "exact_kv_heads" not in facts
    answer = LLM(made).generate("abcd end")[0]
    assert answer.token_ids and model.config.mask_id not in answer.token_ids


def test_training_changes_all_matrices_and_one_row_of_the_embedding(made: Path) -> None:
    model, plain = load_diffusion(made), load_model("smollm2")
    for name, weight in plain.state_dict().items():
        same = torch.equal(model.state_dict()[name], weight)
        assert same is (name.split(".")[-2] not in (*MATRICES, "embed", "head")), name
    rows = (model.embed.weight != plain.embed.weight).any(1).nonzero().flatten().tolist()
    assert rows == [model.config.mask_id]
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_weights_are_those_that_were_trained(
    tied: bool, tiny_teacher: Callable[..., Decoder]
) -> None:
    """Weights that an embedding and an output layer share were changed twice."""
    config = replace(tiny_teacher().config, tied_embeddings=tied)
    model = without_causal_mask(Decoder(config), 7)
    add_row(add_low_rank(model, {"q": 2, "down": 3}, seed=0), 7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, (up, down) in factors(model).items():
            down.copy_(torch.randn(down.shape, generator=generator))
            if name != "embed":
                up.copy_(torch.randn(up.shape, generator=generator))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4 + 1
    before = model(IDS)
    named = list(factors(model))
    assert_close(merge_low_rank(model)(IDS), before, atol=1e-5)
    assert named[0] == "embed" and "head" not in named
    assert (model.head.weight is model.embed.weight) is tied


def test_a_killed_run_resumes_bit_for_bit(
    base: Path,
    corpus: Path,
    tmp_path: Path,
    made: Path,
    killed_before: Callable[[int], AbstractContextManager[None]],
) -> None:
    config = replace(SHORT, mask="<tool>")
    with pytest.raises(RuntimeError, match="killed"), killed_before(4):
        into_diffusion("smollm2", tmp_path / "cut", data=[corpus], config=config)
    with pytest.raises(TrainingError, match="started with config"):
        into_diffusion(
            "smollm2",
            tmp_path / "cut",
            data=[corpus],
            config=replace(config, rank=2),
            resume=True,
        )
    cut = into_diffusion("smollm2", tmp_path / "cut", data=[corpus], config=config, resume=True)
    assert (cut / WEIGHTS).read_bytes() == (made / WEIGHTS).read_bytes()


def test_any_other_model_is_written_whole(
    teacher_dir: Path, corpus: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rare = tokenizer.convert_ids_to_tokens(289)
    out = into_diffusion(
        teacher_dir, tmp_path / "out", data=[corpus], config=replace(SHORT, mask=rare)
    )
    model = load_diffusion(out)
    assert model.config.mask_id == 289 and not (out / WEIGHTS).exists()
    assert load_tokenizer(out).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(UnsupportedModel, match="holds a model of kind 'diffusion'"):
        into_diffusion(out, tmp_path / "again", data=[corpus], config=SHORT)


def test_the_mask_is_the_last_special_token_that_nobody_uses(
    tokenizer: PreTrainedTokenizerFast, tiny_teacher: Callable[..., Decoder]
) -> None:
    config, words = tiny_teacher().config, copy.deepcopy(tokenizer)
    with pytest.raises(ConfigError, match="no special token that is free"):
        mask_of(words, config)
    with pytest.raises(ConfigError, match="the tokenizer has no token '<nothing>'"):
        mask_of(words, config, "<nothing>")
    words.add_tokens(["<spare>", "<asked>"], special_tokens=True)
    words.chat_template = "{{ messages }}<asked>"
    assert words.convert_ids_to_tokens(mask_of(words, config)) == "<spare>"
    words.add_special_tokens({"mask_token": "<own>"})
    assert words.convert_ids_to_tokens(mask_of(words, config)) == "<own>"


def test_what_cannot_become_one_is_refused(
    teacher_dir: Path, corpus: Path, tmp_path: Path, base: Path
) -> None:
    long = replace(SHORT, mask="<tool>", context=500)
    with pytest.raises(ConfigError, match="500 tokens is beyond the 96 positions"):
        into_diffusion("smollm2", tmp_path / "out", data=[corpus], config=long)
    for name in ("embedded-aug", "smollm2-aug"):
        with pytest.raises((ConfigError, CheckpointError), match="softmax attention|smollm2"):
            into_diffusion(name, tmp_path / "out", data=[corpus], config=replace(SHORT, mask="a"))
    with pytest.raises(ConfigError, match="rank"):
        replace(SHORT, rank=0)
    assert not (tmp_path / "out").exists()
