"""What caches keep unless they are asked otherwise: the 16-bit floats that the weights are stored in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer
from gguf_files import tiny

from linspec import LLM
from linspec.bench.model import info
from linspec.checkpoints.config_file import read_config_file
from linspec.checkpoints.dtype import auto_kind, cache_kind, kept_dtype
from linspec.checkpoints.hub import load_model, save_model
from linspec.decoding.sampling import SamplingParams
from linspec.evaluate.lossless import verify
from linspec.evaluate.perplexity import evaluate_source
from linspec.evaluate.quantize import quantize

KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float": torch.float32}


@pytest.fixture(scope="module", params=KINDS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose weights are stored in the kind of cache that its parent is called after."""
    place = tmp_path_factory.mktemp("models") / request.param / "model"
    place.parent.mkdir()
    return save_model(text_model("softmax"), tiny_tokenizer(), place, KINDS[request.param])


def test_a_cache_keeps_the_16_bits_of_the_weights(stored: Path) -> None:
    kind = stored.parent.name
    for settings in (
        {},
        {"quantize": 8},
        {"dtype": "float32"},
        {"drafter": f"draft-model:{stored}"},
    ):
        llm = LLM(stored, max_batch=1, **settings)
        assert llm.kv_cache_dtype == kind
        assert {part.keys.dtype for part in llm.engine.state.parts} == {KINDS[kind]}
    assert llm.engine.drafter is not None
    drafted = llm.engine.drafter.state.parts  # type: ignore[attr-defined]
    assert {part.keys.dtype for part in drafted} == {KINDS[kind]}


def test_asking_outranks_the_weights(stored: Path) -> None:
    for name, kept in (("float32", "float"), ("float16", "float16"), ("int8", "int8")):
        assert LLM(stored, kv_cache_dtype=name).kv_cache_dtype == kept
    assert LLM(stored, kv="float").kv_cache_dtype == "float"
    # it keeps what it computes
    assert LLM(stored, dtype="bfloat16").kv_cache_dtype == "float"


def test_a_quantized_directory_remembers_what_it_was_made_from(
    stored: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def area(width, height):\n    return width * height\n")
    quantize(stored, tmp_path / "small", bits=8, data=[text])
    assert LLM(tmp_path / "small").kv_cache_dtype == stored.parent.name


def test_info_tells_what_is_kept(stored: Path) -> None:
    found, model = info(stored), load_model(stored)
    kind = cache_kind("auto", model)
    assert found["kv_cache_dtype"].startswith(stored.parent.name) and kind == stored.parent.name
    assert found["state_mb"]["8k"] == pytest.approx(
        model.new_state(1, kind).bytes_at(8192) / 1e6, abs=1e-3
    )


def test_what_is_measured_is_what_decodes(stored: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def area(width, height):\n    return width * height\n" * 3)
    auto, exact = (evaluate_source(stored, [text], kv=kv).bits_per_byte for kv in ("auto", "float"))
    assert auto == pytest.approx(exact, rel=1e-2)
    assert (auto == exact) == (stored.parent.name == "float")
    found = verify(stored, "prompt-lookup", prompts=3, tokens=12, draws=120, data=[text])
    assert found.lossless_greedy and found.sampling_p_value is not None
    assert found.sampling_p_value > 1e-6 and found.near_ties == 0


@pytest.mark.parametrize("kind", ["Q4_1", "F16", "BF16", "F32"])
def test_a_gguf_file_keeps_float16_unless_all_of_it_is_float32(kind: str, tmp_path: Path) -> None:
    _, path = tiny("llama", tmp_path / "m.gguf", kind)
    kept = kept_dtype(read_config_file(path))
    assert kept == (None if kind == "F32" else torch.float16)
    assert cache_kind("auto", load_model(path, keep_blocks=True)) == auto_kind(
        kept, load_model(path)
    )


@pytest.mark.parametrize("mixer", ["aug", "gla"])
def test_a_model_without_a_cache_has_nothing_to_keep(mixer: str, tmp_path: Path) -> None:
    path = save_model(text_model(mixer), tiny_tokenizer(), tmp_path / "m", torch.bfloat16)
    llm = LLM(path)
    assert llm.kv_cache_dtype == "float"
    assert llm.generate("ab cd", SamplingParams(max_tokens=3))[0].token_ids
    assert "kv_cache_dtype" not in info(path)


def test_embedded_softmax_is_stored_in_bfloat16() -> None:
    assert LLM("embedded-softmax").kv_cache_dtype == "bfloat16"
    assert LLM("embedded-aug").kv_cache_dtype == "float"
    assert (
        LLM(load_model(model_dir("softmax")), tokenizer=tiny_tokenizer()).kv_cache_dtype == "float"
    )
