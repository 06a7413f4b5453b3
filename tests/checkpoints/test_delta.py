"""Deltas: a model as a small change of the file of another one, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import tiny
from helpers import assert_close

from linspec import LLM
from linspec.checkpoints.checksums import check_files
from linspec.checkpoints.delta import WEIGHTS, exact_heads, save_delta
from linspec.checkpoints.description import describe
from linspec.checkpoints.hub import load_any_config, load_model, load_tokenizer, resolve
from linspec.checkpoints.packages import PACKAGES
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.errors import CheckpointError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.native_linear import NativeLinear
from linspec.train.exact_heads import exact_student
from linspec.train.low_rank import add_low_rank, factors

HEADS = ((0,), (), (0, 1))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """smollm2 as a tiny model that is in the cache."""
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    path = PACKAGES["smollm2"].path
    path.parent.mkdir(parents=True)
    tiny("llama", path, "Q8_0")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGES, "smollm2", replace(PACKAGES["smollm2"], sha256=sha256))
    return path


def trained(ranks: dict[str, int] | None = None) -> Decoder:
    """A student whose low-rank weights are random, and what float16 keeps of them."""
    student = exact_student(load_model("smollm2"), HEADS)
    add_low_rank(student, {"v": 4, "o": 2, "down": 3} if ranks is None else ranks, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in factors(student).values():
            for part in pair:
                part.copy_((torch.randn(part.shape, generator=generator) * 0.05).half())
    return student


def saved(student: Decoder, out: Path) -> Path:
    return save_delta(student.config, factors(student), out, base="smollm2", facts={"tokens": 3})


def ids() -> torch.Tensor:
    return torch.arange(150)[None] % 200


def test_a_delta_on_its_base_is_the_student_that_was_trained(base: Path, tmp_path: Path) -> None:
    student = trained()
    out = saved(student, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", WEIGHTS]
    model = load_model(out)
    assert_close(model(ids()), student(ids()), atol=1e-5)
    assert model.config == student.config == load_any_config(out)
    assert exact_heads(model.config) == 3
    assert load_tokenizer(out).get_vocab() == load_tokenizer("smollm2").get_vocab()
    with torch.no_grad():
        assert float((model(ids()) - load_model("smollm2")(ids())).abs().max()) > 1e-3


def test_frozen_weights_are_those_of_the_file_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model, plain = load_model(saved(trained(), tmp_path / "out")), load_model("smollm2")
    for name, weight in plain.state_dict().items():
        changed = name.rsplit(".", 2)[1] in ("v", "o", "down")
        assert torch.equal(model.state_dict()[name], weight) is not changed


def test_a_delta_generates(base: Path, tmp_path: Path) -> None:
    out = saved(trained(), tmp_path / "out")
    prompt = ids()[0, :90].tolist()
    answers = [LLM(str(path)).generate([prompt])[0].token_ids for path in (out, out)]
    assert answers[0] == answers[1]
    model = load_model(out)
    with torch.no_grad():
        assert answers[0][0] == int(model(ids()[:, :90])[0, -1].argmax())


def test_what_a_delta_leaves_alone_stays_in_blocks(base: Path, tmp_path: Path) -> None:
    out = saved(trained({"o": 2, "down": 3}), tmp_path / "out")
    model, plain = load_model(out, keep_blocks=True), load_model(out).to_inference()
    assert model.config == plain.config
    expected = dict(plain.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, NativeLinear) and name in expected:
            kept = name.rpartition(".")[2] in ("qkv", "gate_up", "head")
            assert bool(layer.formats) is kept, name
            assert torch.equal(layer.weight, expected[name].weight), name
    logits, exact = model(ids()), plain(ids())
    assert float((logits - exact).norm()) < 0.05 * float(exact.norm())


def test_heads_without_low_rank_weights_are_a_delta_too(base: Path, tmp_path: Path) -> None:
    student = trained({})
    model = load_model(saved(student, tmp_path / "out"))
    assert_close(model(ids()), student(ids()), atol=1e-6)


Damage = Callable[[Path, dict[str, Any]], None]


def entry(**changes: Any) -> Damage:
    def change(out: Path, data: dict[str, Any]) -> None:
        data["delta"] |= changes
        (out / "config.json").write_text(json.dumps(data))

    return change


def without_weights(out: Path, data: dict[str, Any]) -> None:
    (out / WEIGHTS).unlink()


def cut_off(out: Path, data: dict[str, Any]) -> None:
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-100])


def other_sizes(out: Path, data: dict[str, Any]) -> None:
    data["decoder"]["mlp_width"] += 32
    (out / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (entry(sha256="0" * 64), "was made for smollm2 with the SHA-256 0000"),
        (entry(base="other"), "a delta of 'other', which this version does not know"),
        (entry(version=2), "a delta of format 2, this version reads 1"),
        (entry(sha256=3), "no sound 'delta' entry"),
        (without_weights, "the delta is not whole"),
        (cut_off, "damaged|incomplete|cannot read"),
        (other_sizes, "not that of smollm2 with other mixers"),
    ],
)
def test_what_is_wrong_with_a_delta_is_named(
    base: Path, tmp_path: Path, damage: Damage, message: str
) -> None:
    out = saved(trained(), tmp_path / "out")
    damage(out, json.loads((out / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=message):
        load_model(out)


def test_a_base_that_is_not_here_names_the_command(base: Path, tmp_path: Path) -> None:
    out = saved(trained(), tmp_path / "out")
    base.unlink()
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="`linspec get smollm2`"):
            load(out)


@pytest.mark.parametrize("name", ["blocks.9.mixer.v", "blocks.0.mixer_norm"])
def test_weights_that_fit_no_layer_are_named(base: Path, tmp_path: Path, name: str) -> None:
    student = trained()
    pair = (torch.zeros(4, 2), torch.zeros(2, 4))
    out = save_delta(student.config, {name: pair}, tmp_path / "out", base="smollm2")
    with pytest.raises(CheckpointError, match=f"{name}.*fits no layer of the base"):
        load_model(out)


def test_a_configuration_with_heads_survives_json(base: Path) -> None:
    config = exact_student(load_model("smollm2"), HEADS).config
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


SHIPPED = {"smollm2-aug": 11, "smollm2-aug-22": 22}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_says_what_it_derives_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))
    facts = describe(name)
    assert facts["exact_kv_heads"] == f"{SHIPPED[name]} of 90"
    assert facts["license"] == "Apache-2.0"
    assert "derived from SmolLM2-135M-Instruct" in facts["notice"]
    assert facts["base"] == "not here yet: linspec get smollm2"
    assert "Apache License 2.0" in (resolve(name) / "NOTICE").read_text()
    assert check_files(resolve(name)) == {WEIGHTS: "match"}
    assert (resolve(name) / WEIGHTS).stat().st_size < 12e6


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_asks_for_its_base_and_refuses_another(base: Path, name: str) -> None:
    """Here smollm2 is another file than the one that the deltas were made for."""
    for load in (load_model, load_tokenizer, load_text_tokenizer):
        with pytest.raises(CheckpointError, match="`linspec get smollm2` brings the right file"):
            load(name)
    base.unlink()
    for load in (load_model, load_tokenizer, load_text_tokenizer):
        with pytest.raises(CheckpointError, match="`linspec get smollm2` downloads it"):
            load(name)
