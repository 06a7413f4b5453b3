"""`linspec info MODEL`: shapes, memory, the step, drafters and the licence, from files of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import model_dir
from gguf_files import tiny
from typer.testing import CliRunner

from linspec import LLM
from linspec.bench.model import LENGTHS, info
from linspec.checkpoints.hub import load_model
from linspec.cli import app
from linspec.kernels.cpu.library import load as load_kernels
from linspec.quantization.blocks import BLOCK_FORMATS

# what 0.2 printed before
OLD = "model path family layers vocab_size width heads kv_heads head_width mlp_width max_positions mixers"


@pytest.mark.parametrize("name", ["softmax", "aug", "window", "gla"])
def test_memory_is_that_of_the_loaded_model(name: str) -> None:
    found, model = info(model_dir(name)), load_model(model_dir(name))
    assert found["parameters"] == sum(each.numel() for each in model.parameters())
    sizes = {label: model.new_state().bytes_at(n) / 1e6 for label, n in LENGTHS.items()}
    assert found["state_mb"] == pytest.approx(sizes, abs=1e-3)
    assert ("state_mb_int8" in found) == (name in ("softmax", "window"))
    assert found["weights_mb"]["float32"] == pytest.approx(found["parameters"] * 4e-6, abs=1e-3)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_1", "Q2_K", "F16"])
def test_memory_of_a_file_is_that_of_its_blocks(family: str, kind: str, tmp_path: Path) -> None:
    _, path = tiny(family, tmp_path / "m.gguf", kind)
    found, model = info(path), load_model(path, keep_blocks=True)
    tensors = {each.data_ptr(): each.nbytes for each in model.state_dict().values()}
    # floats of 32 outputs are no more than those that there are; buffers of positions do not count
    assert found["weights_mb"]["in_memory"] == pytest.approx(sum(tensors.values()) / 1e6, rel=0.01)
    kept = load_kernels().library is not None and kind in BLOCK_FORMATS
    assert ("kept in their blocks" in found.get("note", "")) is kept


@pytest.mark.parametrize("name", ["softmax", "aug", "window", "gla", "hedgehog", "rfa"])
def test_the_step_is_that_of_the_loaded_model(name: str) -> None:
    native = load_model(model_dir(name)).to_inference().native
    said = info(model_dir(name))["step"]
    assert said.startswith("one call into C" if native is not None else "layer by layer: ")


def test_all_keys_are_printed_for_people_and_programs(tmp_path: Path) -> None:
    _, path = tiny("llama", tmp_path / "m.gguf", "Q8_0")
    result = CliRunner().invoke(app, ["info", str(path), "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    new = "dtype tokenizer chat_template parameters weights_mb state_mb state_mb_int8 step drafters"
    assert set(f"{OLD} {new}".split()) <= found.keys()
    people = CliRunner().invoke(app, ["info", str(path)]).stdout
    assert all(name in people for name in found) and "prompt-lookup" in people


def test_heads_in_the_directory_are_named() -> None:
    assert info("embedded-aug")["drafters"] == ["prompt-lookup", "suffix", "medusa"]
    for drafter in info("embedded-aug")["drafters"]:
        assert LLM("embedded-aug", drafter=drafter).generate("a")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("# A model\nlicense: mit\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
    ],
)
def test_the_licence_is_that_of_the_model_card(
    card: str, licence: str | None, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_dir("softmax"), tmp_path / "m"))
    (folder / "README.md").write_text(card)
    found = info(folder)
    assert found.get("license") == licence
    assert (found["dtype"], found["chat_template"]) == ("float32", False)
    (folder / "chat_template.jinja").write_text("x")
    assert info(folder)["chat_template"] and found["tokenizer"].startswith("BPE, ")


def test_a_delta_is_described_without_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))
    found = info("smollm2-aug")
    assert found["exact_kv_heads"] == "11 of 90" and "not here yet" in found["base"]
    assert "mixers" not in found["step"]
    assert found["state_mb"]["8k"] == pytest.approx(33.586, abs=0.01)
