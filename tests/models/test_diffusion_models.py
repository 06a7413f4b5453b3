"""Masked-diffusion models: they load from their own directories, equal plain torch, and stay themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_diffusion import CONFIGS, DREAM, LLADA, MASK, SDAR, VOCAB, write
from typer.testing import CliRunner

from linspec.checkpoints.hub import (
    load_any,
    load_causal_model,
    load_config,
    load_decoder,
    load_diffusion,
    load_model,
    save_model,
)
from linspec.checkpoints.load_quantized import load_for, load_plain
from linspec.cli import app
from linspec.decoding.step import StepInput
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.evaluate.perplexity import evaluate
from linspec.kernels.cpu.library import load as load_kernels
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.model_types import loop_of

VARIANTS = {
    "llada": LLADA,
    "llada-tied": LLADA | {"weight_tying": True, "n_kv_heads": None, "multi_query_attention": True},
    "llada-biased": LLADA | {"include_qkv_bias": True, "mlp_hidden_size": None},
    "dream": DREAM,
    "sdar": SDAR,
    "sdar-tied": SDAR | {"tie_word_embeddings": True, "block_size": 7},
    "dream-tied": DREAM | {"tie_word_embeddings": True, "num_key_value_heads": 4},
}
VARIANTS["llada-tied"] |= {"n_kv_heads": 1}
VARIANTS["llada-biased"] |= {"mlp_hidden_size": 128}


def ids(count: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=draw).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_plain_torch(tmp_path: Path, name: str) -> None:
    plain = write(tmp_path / "m", VARIANTS[name])
    model = load_diffusion(tmp_path / "m")
    assert isinstance(model, MaskedDiffusion) and loop_of(model) == "masked-diffusion"
    for count in (1, 7, 90):
        given = ids(count)
        found = model.predicted(torch.tensor([given]))[0]
        torch.testing.assert_close(found, plain.predicted(given), rtol=0, atol=1e-4)
    rows, lengths = [ids(n, n) for n in (9, 4, 6)], (9, 4, 6)
    padded = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths]).bool()
    found = model(padded, mask)
    for row, one, n in zip(rows, found, lengths, strict=True):
        torch.testing.assert_close(one[9 - n :], plain.logits(row), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved_is_what_was_loaded(tmp_path: Path, name: str) -> None:
    write(tmp_path / "m", VARIANTS[name])
    model = load_diffusion(tmp_path / "m")
    again = load_diffusion(save_model(model, None, tmp_path / "again"))
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert said["model_type"] == VARIANTS[name]["model_type"]
    assert again.config == model.config
    given = torch.tensor([ids(8)])
    assert torch.equal(again(given), model(given))


def test_what_no_ordinary_format_says_is_saved_as_our_own(tmp_path: Path) -> None:
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
    config = DiffusionConfig(
        vocab_size=20, mask_id=19, logit_shift=1, family="llada", qk_norm=True, **sizes
    )
    torch.manual_seed(0)
    model = MaskedDiffusion(config).eval()
    again = load_diffusion(save_model(model, None, tmp_path / "m"))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "linspec"
    assert isinstance(again, MaskedDiffusion) and again.config == config
    given = torch.tensor([[1, 2, 19, 19]])
    assert torch.equal(again(given), model(given))


def test_info_says_what_it_is(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        write(tmp_path / name, config)
        result = CliRunner().invoke(app, ["info", str(tmp_path / name), "--json"])
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        assert said["family"] == config["model_type"] and said["mask_id"] == MASK
        assert said["decodes_by"] == "masked diffusion"
        assert said["logit_shift"] == (name == "dream")
        native = load_kernels().library
        assert said["step"] == "one call into C" if native else "layer by layer" in said["step"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (LLADA | {"block_type": "sequential"}, UnsupportedModel, "block_type 'sequential'"),
        (LLADA | {"rope": False}, UnsupportedModel, "rope False"),
        (LLADA | {"activation_type": "swiglu"}, UnsupportedModel, "swiglu"),
        (LLADA | {"embedding_size": 64}, UnsupportedModel, "embedding_size 64"),
        ({k: LLADA[k] for k in LLADA if k != "mask_token_id"}, CheckpointError, "mask_token_id"),
        (LLADA | {"mask_token_id": VOCAB}, CheckpointError, "mask_id must be .* from 0 to 60"),
        (DREAM | {"use_sliding_window": True, "sliding_window": 4}, UnsupportedModel, "sliding"),
        (SDAR | {"block_size": 0}, CheckpointError, "block_length"),
        (SDAR | {"use_sliding_window": True, "sliding_window": 4}, UnsupportedModel, "sliding"),
        (DREAM | {"mask_token_id": "x"}, CheckpointError, "mask"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    known = {"llada": LLADA, "Dream": DREAM, "sdar": SDAR}
    write(tmp_path / "m", known[config["model_type"]])
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        load_diffusion(tmp_path / "m")


def test_what_needs_the_next_token_says_why_not(tmp_path: Path) -> None:
    source = tmp_path / "m"
    write(source, LLADA)
    with pytest.raises(ConfigError, match="`masked_bound` bounds its bits per byte"):
        evaluate(load_diffusion(source), None, ["text"])
    for load in (load_model, load_config, load_plain, lambda given: load_for(given, None)):
        with pytest.raises(UnsupportedModel, match="wants kind 'decoder'. Use load_diffusion"):
            load(source)
    model = load_diffusion(source).to_inference()
    with pytest.raises(ConfigError, match="loop 'masked-diffusion'"):
        model.step([StepInput(0, [1, 2])], model.new_state())


def test_whatever_writes_loads_it(tmp_path: Path) -> None:
    write(tmp_path / "m", DREAM)
    for load in (load_causal_model, load_decoder, load_any):
        assert isinstance(load(tmp_path / "m"), MaskedDiffusion)
    for bits in (8, 4):
        small = load_for(tmp_path / "m", bits, read=load_decoder)
        assert isinstance(small, MaskedDiffusion) and small.is_inference
