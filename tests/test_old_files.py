"""What linspec 0.1.0 wrote loads and goes on; what a newer linspec wrote is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer
from helpers import kill_before
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from linspec import LLM, SamplingParams
from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.hub import load_any_config, load_model, save_model
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.saved import save_drafter
from linspec.drafters.saved_packed import HEADS
from linspec.errors import CheckpointError, ConfigError, DrafterError, LinspecError, TrainingError
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.utils.format_version import CURRENT, check_format, stamped
from studies.lib.cells import Cells

DATA = "abcd end the end, and the other end of it\n" * 200


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


# ---- directories as linspec 0.1.0 wrote them, by hand


def old_model(folder: Path) -> Decoder:
    """A linear decoder in linspec's own format of 0.1.0, with Medusa heads, both without a version."""
    model = text_model("aug")
    folder.mkdir()
    mixer = {
        "name": "aug", "group": 16, "span": 1, "kernel": "own", "taps": 4, "window": 0,
        "features": 0, "keep": 0, "seed": 0,
    }  # fmt: skip
    ours = model.config.mixers[0]
    mixer |= {"group": ours.group, "span": ours.span, "kernel": ours.kernel, "taps": ours.taps}
    shape = {
        "vocab_size": model.config.vocab_size,
        "width": model.config.width,
        "layers": 2,
        "heads": model.config.heads,
        "kv_heads": model.config.kv_heads,
        "head_width": model.config.head_width,
        "mlp_width": model.config.mlp_width,
        "mixers": [mixer, mixer],
        "family": "llama",
        "norm": "rms",
        "norm_eps": 1e-6,
        "activation": "silu",
        "gated_mlp": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "positions": "rope",
        "rope": {
            "theta": 10000.0, "kind": "default", "factor": 1.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_positions": 8192,
        },
        "relative": None,
        "scaled_scores": True,
        "max_positions": 256,
        "pad_id": None,
        "tied_embeddings": True,
        "logit_scale": 1.0,
        "bos_id": 0,
        "eos_ids": [0],
    }  # fmt: skip
    config = {
        "model_type": "linspec",
        "architectures": ["LinspecForCausalLM"],
        "vocab_size": model.config.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "dtype": "float32",
        "decoder": shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n != "head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    _old_heads(folder / "medusa", model)
    return model


def _old_heads(folder: Path, model: Decoder) -> None:
    folder.mkdir()
    width, size = model.config.width, model.config.vocab_size
    heads = MedusaHeads(HeadsConfig(width=width, vocab_size=size, heads=2, hidden=8), model)
    heads.initialize(torch.Generator().manual_seed(0))
    facts = {
        "kind": "medusa",
        "width": width,
        "vocab_size": size,
        "heads": 2,
        "blocks": 1,
        "hidden": 8,
        "shared_head": True,
        "target": fingerprint(model),
        "accuracies": [[0.5, 0.1], [0.25, 0.1]],
    }
    (folder / "drafter.json").write_text(json.dumps(facts))
    tensors = {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}
    save_file(tensors, folder / "drafter.safetensors")


def test_a_model_of_0_1_0_decodes_with_its_heads(tmp_path: Path) -> None:
    model = old_model(tmp_path / "old")
    assert load_any_config(tmp_path / "old") == model.config
    loaded = load_model(tmp_path / "old")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    heads = HEADS.load(tmp_path / "old" / "medusa", loaded)
    assert heads.accuracies == [[0.5, 0.1], [0.25, 0.1]]
    params = SamplingParams(max_tokens=12)
    plain = LLM(tmp_path / "old").generate("abcd", params)[0]
    drafted = LLM(tmp_path / "old", drafter="medusa", policy=6).generate("abcd", params)[0]
    assert drafted.token_ids == plain.token_ids
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert theirs.config.format_version == CURRENT


def old_run(source: Path, out: Path, data: Path, config: LinearizeConfig) -> None:
    """A run of 0.1.0 that was stopped before its first step."""
    (out / "training").mkdir(parents=True)
    mixer = {
        "name": "aug", "group": 8, "span": 2, "kernel": "softmax", "taps": 4, "window": 0,
        "features": 0, "keep": 0, "seed": 0,
    }  # fmt: skip
    training = {
        "tokens": config.tokens,
        "transfer_share": 0.0,
        "context": config.context,
        "batch_tokens": config.batch_tokens,
        "lr": 3e-4,
        "transfer_lr": 5e-3,
        "muon_lr": None,
        "mixer_lr_factor": 10.0,
        "warmup": 10,
        "kl_weight": 1.0,
        "lora_rank": 0,
        "lora_alpha": 16,
        "precision": "auto",
        "save_every": 120.0,
        "seed": 0,
    }
    plan = {
        "source": str(source),
        "mixers": [mixer, mixer],
        "rows": 24,
        "softmax_layers": 0,
        "data": [str(data)],
        "field": "text",
        "config": training,
    }
    (out / "training" / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize("name", ["rows", "exact_tokens"])
def test_a_run_of_0_1_0_goes_on(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.txt"
    data.write_text(DATA)
    config = LinearizeConfig(tokens=256, context=32, batch_tokens=64)
    old_run(model_dir("softmax"), tmp_path / "s", data, config)
    asked: dict[str, Any] = {"group": 8, "taps": 4, "data": [data], "config": config, name: 24}
    if name == "rows":
        monkeypatch.setattr("warnings.warn", lambda *a, **k: None)
    with pytest.raises(TrainingError, match="started with exact_tokens = 24, now it is 32"):
        linearize(model_dir("softmax"), tmp_path / "s", resume=True, **{**asked, name: 32})
    out = linearize(model_dir("softmax"), tmp_path / "s", resume=True, **asked)
    assert all(mixer.span >= 1 for mixer in load_any_config(out).mixers)
    record = json.loads((out / "linearize.json").read_text())
    assert (record["format_version"], record["plan"]["exact_tokens"]) == (CURRENT, 24)


def test_a_finished_run_of_0_1_0_is_known_as_done(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text(DATA)
    asked: dict[str, Any] = {
        "mixer": MixerConfig(name="aug", group=8, taps=4),
        "data": [data],
        "config": LinearizeConfig(tokens=128, context=32, batch_tokens=64, transfer_share=0.5),
    }
    out = linearize(model_dir("softmax"), tmp_path / "s", **asked)
    file = out / "linearize.json"
    record = json.loads(file.read_text())
    # as 0.1.0 wrote it
    del record["format_version"], record["recipe"]
    record["plan"]["rows"] = record["plan"].pop("exact_tokens")
    file.write_text(json.dumps(record))
    with kill_before(0):
        assert linearize(model_dir("softmax"), out, resume=True, **asked) == out


# ---- the version itself


def test_everything_that_linspec_writes_carries_the_version(tmp_path: Path) -> None:
    model = text_model("aug")
    save_model(model, tiny_tokenizer(), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["format_version"] == CURRENT
    heads = MedusaHeads(
        HeadsConfig(width=model.config.width, vocab_size=model.config.vocab_size), model
    )
    save_drafter(heads, model, tmp_path / "h")
    assert json.loads((tmp_path / "h" / "drafter.json").read_text())["format_version"] == CURRENT
    Cells(tmp_path).write("a", {"x": 1})
    assert Cells(tmp_path).read("a") == {"format_version": CURRENT, "x": 1}
    # what transformers saves of it too
    AutoConfig.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "t")
    assert json.loads((tmp_path / "t" / "config.json").read_text())["format_version"] == CURRENT
    # a directory of an ordinary family is not linspec's own
    assert "format_version" not in json.loads((model_dir("softmax") / "config.json").read_text())


def rewritten(file: Path, version: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version}))


Reader = tuple[str, type[LinspecError], Callable[[Path], object]]
READERS: list[Reader] = [
    ("config.json", CheckpointError, load_any_config),
    ("config.json", ConfigError, AutoConfig.from_pretrained),
    ("medusa/drafter.json", DrafterError, lambda d: HEADS.load(d / "medusa", load_model(d))),
    ("cells/a.json", CheckpointError, lambda d: Cells(d).read("a")),
]


@pytest.mark.parametrize(("file", "error", "read"), READERS)
def test_a_newer_version_is_refused_by_name(
    tmp_path: Path, file: str, error: type[LinspecError], read: Callable[[Path], object]
) -> None:
    folder = tmp_path / "old"
    old_model(folder)
    Cells(folder).write("a", {"x": 1})
    read(folder)
    rewritten(folder / file, "7.0")
    with pytest.raises(
        error, match=r"has format_version 7\.0, and this linspec knows 0\.2 and older"
    ):
        read(folder)


def test_a_newer_run_is_refused_by_name(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text(DATA)
    config = LinearizeConfig(tokens=256, context=32, batch_tokens=64)
    old_run(model_dir("softmax"), tmp_path / "s", data, config)
    rewritten(tmp_path / "s" / "training" / "plan.json", "0.10")
    with pytest.raises(TrainingError, match=r"has format_version 0\.10, and this linspec"):
        linearize(
            model_dir("softmax"), tmp_path / "s", data=[data], config=config, taps=4, resume=True
        )
    shutil.rmtree(tmp_path / "s")


def test_versions_are_numbers_and_none_is_the_first() -> None:
    assert check_format({}, "x.json") == "0.1"
    assert check_format(stamped({}), "x.json") == CURRENT
    for wrong in (1, None, "1", "v0.2", "0.2.1", True):
        with pytest.raises(CheckpointError, match="x.json: format_version must be two numbers"):
            check_format({"format_version": wrong}, "x.json")
