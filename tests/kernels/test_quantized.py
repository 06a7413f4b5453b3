"""Quantized models: on disk and back, mapped and refused, and lossless under speculation."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linspec.checkpoints.hub import load_config, load_model, load_tokenizer, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.checkpoints.quantized import map_tensors, write_aligned
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import StepInput
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.lookup import PromptLookup
from linspec.drafters.medusa import Medusa
from linspec.drafters.packed import PackedHeads
from linspec.errors import CheckpointError, ConfigError, StateError
from linspec.evaluate.quantize import quantize
from linspec.kernels import device
from linspec.llm import LLM
from linspec.models import memory
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer
from linspec.state import memory as state_memory
from linspec.utils.ram import available_bytes

TEXT = "def area(width, height):\n    return width * height\n\n\n" * 40


def quantized_heads(model: Decoder, bits: int) -> Medusa:
    """The student's heads on its teacher, whose hidden states are much the same."""
    shape = HeadsConfig(width=256, vocab_size=4096, heads=3, hidden=512)
    heads = MedusaHeads(shape, model, [[0.3, 0.1, 0.1], [0.2, 0.1], [0.2]])
    heads.load_state_dict(load_file(resolve("embedded-aug") / "medusa" / "drafter.safetensors"))
    return Medusa(PackedHeads.of(heads, Quantizer(bits, {})))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded linear model with 4 bits, and the text that it was calibrated on."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text.txt").write_text(TEXT)
    settings = {"data": [folder / "text.txt"], "calibration_bytes": 0, "limit_bytes": 1000}
    report = quantize("embedded-aug", folder / "int4", bits=4, **settings)
    assert report.megabytes_after < 0.4 * report.megabytes_before
    # too little text to say more than that both were measured
    found = report.drafters["medusa"]
    assert len(found["first_guess_before"]) == len(found["first_guess_after"]) == 3
    return folder / "int4"


def test_a_quantized_directory_is_the_quantized_model(small: Path) -> None:
    loaded, made = load_model(small), load_for("embedded-aug", 4)
    assert loaded.is_inference and loaded.identity == made.identity
    logits = []
    for model in (loaded, made):
        logits.append(model.step([StepInput(0, list(range(5, 30)))], model.new_state()).logits)
    assert torch.equal(*logits)


def test_drafters_come_along_quantized(small: Path) -> None:
    llm = LLM(small, drafter="medusa", policy=6)
    assert isinstance(llm.engine.drafter, Medusa)
    assert isinstance(llm.engine.drafter.heads, PackedHeads)
    assert len((small / "medusa" / "drafter.safetensors").read_bytes()) < 0.3 * len(
        (resolve("embedded-aug") / "medusa" / "drafter.safetensors").read_bytes()
    )
    plain = LLM(small)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for prompt in ("def area(", "import os\n\n\nclass"):
        assert (
            llm.generate(prompt, params)[0].token_ids == plain.generate(prompt, params)[0].token_ids
        )


def test_a_quantized_draft_model_drafts(small: Path) -> None:
    """From its own directory, as any draft model."""
    llm = LLM("embedded-softmax", drafter=f"student:{small}", policy=4, max_batch=1)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    found = llm.generate("import os\n\n\nclass", params)[0]
    assert found.stats.accepted > 0
    plain = LLM("embedded-softmax", max_batch=1)
    assert found.token_ids == plain.generate("import os\n\n\nclass", params)[0].token_ids


@pytest.mark.crossed(2)
@pytest.mark.parametrize("bits", [8, 4])
def test_speculation_is_lossless_with_quantized_weights(bits: int) -> None:
    """Softmax and integer weights: every bit of every logit, so no near tie can differ."""
    model, tokenizer = load_for("embedded-softmax", bits), load_tokenizer("embedded-softmax")
    plain = LLM(model, tokenizer=tokenizer)
    drafters = (
        PromptLookup(),
        DraftModel(load_for("embedded-aug", 4), model.config, 8),
        quantized_heads(model, bits),
    )
    params = SamplingParams(max_tokens=50, ignore_eos=True, logprobs=2)
    for prompt in (TEXT[:150], "x = [1, 2, 3]\n" * 8):
        expected = plain.generate(prompt, params)[0]
        for drafter in drafters:
            fast = LLM(model, tokenizer=tokenizer, drafter=drafter, policy=7)
            found = fast.generate(prompt, params)[0]
            assert found.token_ids == expected.token_ids
            assert found.logprobs == expected.logprobs
            assert found.stats.accepted > 0


def test_weights_are_mapped_not_read(small: Path) -> None:
    tensors = map_tensors(small / "model.safetensors")
    packed = [tensor for tensor in tensors.values() if tensor.dtype == torch.uint8]
    assert packed and all(tensor.data_ptr() % 64 == 0 for tensor in packed)
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed}) == 1


def test_odd_sizes_keep_the_rest_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3), "b": torch.rand(32), "c": torch.rand(5).bfloat16()}
    write_aligned(tensors, tmp_path / "x.safetensors")
    found = map_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def edited(small: Path, tmp_path: Path, **changes: object) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in small.iterdir():
        if path.is_file() and path.name != "config.json":
            (copy / path.name).symlink_to(path)
    config = json.loads((small / "config.json").read_text())
    config["quantization"] |= changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_other_formats_are_refused_by_name(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="format 7, this linspec reads format 1"):
        load_model(edited(small, tmp_path, format=7))


def test_wrong_bits_do_not_fit(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="different models"):
        load_model(edited(small, tmp_path, bits=8))


@pytest.mark.parametrize("bits", [3, "eight", [8], None])
def test_unknown_bits_are_refused_by_name(small: Path, tmp_path: Path, bits: object) -> None:
    with pytest.raises(CheckpointError, match="known: 8 and 4"):
        load_model(edited(small, tmp_path, bits=bits))


def test_a_cut_file_is_refused(small: Path, tmp_path: Path) -> None:
    copy = edited(small, tmp_path)
    (copy / "model.safetensors").unlink()
    data = (small / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_model(copy)


@pytest.mark.parametrize("quantized", [True, False])
def test_too_little_memory_is_said_before_loading(
    small: Path, monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    with pytest.raises(CheckpointError, match=r"needs .* GiB"):
        load_model(small if quantized else "embedded-aug")


def test_a_cache_that_does_not_fit_is_said_before_it_is_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM("embedded-softmax", max_batch=1)
    monkeypatch.setattr(state_memory, "free_bytes", lambda device: 2**10)
    llm.generate([5] * 20, SamplingParams(max_tokens=1))
    with pytest.raises(StateError, match=r"keys and values of 200 tokens need .* GiB"):
        llm.generate([5] * 200, SamplingParams(max_tokens=1))


def test_a_gpu_without_room_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**19, 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 2**19)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**19)
    # what torch keeps for tensors to come can still be had
    memory.check_memory(3 * 2**19, tmp_path, "cuda:0")
    with pytest.raises(CheckpointError, match=r"are free on cuda:0; close other programs"):
        memory.check_memory(3 * 2**19 + 1, tmp_path, "cuda:0")
    with pytest.raises(StateError, match=r"need 1.0 GiB more memory and 0.0 GiB are free"):
        state_memory.check_growth(2**30, 100, torch.device("cuda", 0))


def test_pages_of_files_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a model that lies in the page cache would be refused for the memory that it takes itself."""
    (tmp_path / "proc").mkdir()
    meminfo = "MemFree: 10 kB\nMemAvailable: 4096 kB\nCached: 4090 kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    monkeypatch.setattr(device, "available_bytes", partial(available_bytes, tmp_path))
    memory.check_memory(4096 * 1024, tmp_path)
    with pytest.raises(CheckpointError, match="are free"):
        memory.check_memory(4096 * 1024 + 1, tmp_path)
    monkeypatch.setattr(device, "available_bytes", partial(available_bytes, tmp_path / "nothing"))
    memory.check_memory(2**60, tmp_path)


def test_quantizing_twice_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(small, tmp_path / "again", bits=8)
    with pytest.raises(ConfigError, match="quantized already"):
        LLM(small, quantize=8)
    with pytest.raises(ConfigError, match="8 or 4 bits, got 5"):
        quantize("embedded-aug", tmp_path / "odd", bits=5)


def test_the_configuration_is_read_without_the_weights(small: Path) -> None:
    assert load_config(small) == load_config(resolve("embedded-aug"))
