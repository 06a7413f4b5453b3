"""Models from GGUF files: transformers' logits for every architecture and number format, in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import IDS, byte_words, hf_config, tiny, write
from gguf_files import _keys as keys_of
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.checkpoints.gguf.architectures import ARCHITECTURES
from linspec.checkpoints.gguf.config import read_config
from linspec.checkpoints.gguf.reader import read_gguf
from linspec.checkpoints.gguf.ropes import share_of
from linspec.checkpoints.gguf.types import TYPES
from linspec.checkpoints.hub import load_config, load_model, load_tokenizer, save_model
from linspec.cli import app
from linspec.decoding.step import StepInput
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.mixers.rope_config import RopeConfig
from linspec.models.decoder import Decoder
from linspec.train.linearize import stored_dtype

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text", "olmo2", "smollm3"),
    *("granite", "starcoder2", "stablelm", "gpt_neox", "phi3"),
)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5e4,
    "long_factor": [1.0 + i / 2 for i in range(16)],
    "short_factor": [1.0 + i / 50 for i in range(16)],
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 500.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e4,
}
IDS_OF_A_TEXT = torch.tensor([[5, 60, 200, 7, 7, 281, 9, 33, 100, 140, 3, 2, 90, 17, 18, 19]])


def same_logits(theirs: Any, ours: Decoder, ids: torch.Tensor = IDS_OF_A_TEXT) -> None:
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    scale = max(1.0, float(expected.abs().max()))
    assert float((expected - found).abs().max()) <= 1e-4 * scale


@pytest.mark.crossed(6)
@pytest.mark.parametrize("kind", sorted(IDS))
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_logits_are_those_of_transformers(family: str, kind: str, tmp_path: Path) -> None:
    theirs, path = tiny(family, tmp_path / "m.gguf", kind)
    same_logits(theirs, load_model(path))


@pytest.mark.crossed(3)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 8}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
        ),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen2", {"rope_parameters": YARN}),
        ("gemma3_text", {"num_hidden_layers": 3}),
        ("gemma3_text", {"final_logit_softcapping": 3.0}),
        ("olmo2", {"num_key_value_heads": 8}),
        ("smollm3", {"num_hidden_layers": 3, "tie_word_embeddings": False}),
        ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
        ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("phi3", {"sliding_window": 6, "tie_word_embeddings": True}),
        (
            "phi3",
            {
                "rope_parameters": LONGROPE,
                "original_max_position_embeddings": 8,
                "partial_rotary_factor": 1.0,
            },
        ),
    ],
    ids=str,
)
def test_variants_of_a_family_are_read_from_keys_and_tensors(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs, path = tiny(family, tmp_path / "m.gguf", **changes)
    same_logits(theirs, load_model(path))


@pytest.mark.crossed(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_and_a_gguf_file_of_one_model_are_alike(family: str, tmp_path: Path) -> None:
    theirs, path = tiny(family, tmp_path / "m.gguf")
    theirs.save_pretrained(tmp_path / "hf")
    load_tokenizer(path).save_pretrained(tmp_path / "hf")
    ours, directory = load_model(path), load_model(tmp_path / "hf")
    assert ours.config == directory.config
    for name, tensor in directory.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    prompts = ["abcd the end", "12345 tt", "é"]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    one, other = (
        LLM(each, max_batch=3).generate(prompts, params) for each in (path, tmp_path / "hf")
    )
    assert [a.token_ids for a in one] == [b.token_ids for b in other]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([load_tokenizer(path)(prompts[0])["input_ids"]]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
    assert tuple(expected[0, -12:].tolist()) == one[0].token_ids


@pytest.mark.crossed(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_token(family: str, tmp_path: Path) -> None:
    _, path = tiny(family, tmp_path / "m.gguf")
    prompts = ["abcd the end abcd the end abcd", "12 12 12 12", "é"]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    plain = LLM(path, max_batch=3).generate(prompts, params)
    drafted = LLM(path, max_batch=3, drafter="prompt-lookup", policy=4).generate(prompts, params)
    assert [a.token_ids for a in plain] == [b.token_ids for b in drafted]
    assert max(each.stats.tokens_per_round for each in drafted) > 1


@pytest.mark.crossed(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_form_of_a_gguf_model_is_its_full_form(family: str, tmp_path: Path) -> None:
    model = load_model(tiny(family, tmp_path / "m.gguf", "Q8_0")[1])
    state = model.new_state(2)
    with torch.no_grad():
        full = model(IDS_OF_A_TEXT)[0]
        for at, token in enumerate(IDS_OF_A_TEXT[0].tolist()):
            found = model.step([StepInput(1, [token])], state).logits[-1]
            state.commit(1, range(1))
            assert torch.allclose(found, full[at], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_model_is_saved_as_an_ordinary_directory(family: str, tmp_path: Path) -> None:
    _, path = tiny(family, tmp_path / "m.gguf", "F16")
    model = load_model(path)
    save_model(model, load_tokenizer(path), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == family
    again = load_model(tmp_path / "out")
    assert torch.equal(again(IDS_OF_A_TEXT), model(IDS_OF_A_TEXT))


def test_the_copy_of_the_embedding_that_gpt2_files_carry_is_one_tensor(tmp_path: Path) -> None:
    _, path = tiny("gpt2", tmp_path / "m.gguf")
    file = read_gguf(path)
    tensors = {n: (t.kind.name, t.shape, file.raw(n).tobytes()) for n, t in file.tensors.items()}
    copied = {**tensors, "output.weight": tensors["token_embd.weight"]}
    assert load_model(write(tmp_path / "copy.gguf", file.keys, copied)).config.tied_embeddings
    kind, shape, content = tensors["token_embd.weight"]
    other = {**tensors, "output.weight": (kind, shape, content[::-1])}
    assert not read_config(
        read_gguf(write(tmp_path / "other.gguf", file.keys, other))
    ).tied_embeddings


def test_the_dtype_of_a_file_loses_nothing(tmp_path: Path) -> None:
    assert stored_dtype(tiny("llama", tmp_path / "a.gguf", "F16")[1]) == torch.float32
    assert stored_dtype(tiny("llama", tmp_path / "b.gguf", "Q4_0")[1]) == torch.float32


def test_a_file_says_that_it_is_dequantized(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, path = tiny("llama", tmp_path / "m.gguf", "Q4_1")
    with caplog.at_level("INFO", "linspec"):
        load_model(path)
    assert "23 Q4_1" in caplog.text and "as floats" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "supported: llama, qwen2, qwen3, gpt2"),
        ({"general.type": "adapter"}, "holds no model but 'adapter'"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.block_count": 4}, "claims 4 layers"),
        ({"llama.block_count": 2}, "has what no such model has: blk.2"),
        ({"llama.block_count": 2**31}, "claims 2147483648 layers"),
        ({"llama.embedding_length": 128}, "shape"),
        ({"llama.attention.head_count": 0}, "0 attention heads"),
        ({"llama.attention.key_length": 0}, "heads of 0 features"),
        ({"llama.attention.head_count": 2**20}, "heads of 0 features"),
        ({"llama.attention.head_count": 7}, "cannot share"),
        ({"llama.attention.head_count_kv": 3}, "cannot share"),
        ({"llama.attention.head_count": "8"}, "must be a whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a finite number"),
        ({"llama.rope.scaling.type": "su"}, "rope scaling 'su'"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            "does not say 'llama.rope.scaling.original_context_length'",
        ),
        ({"llama.rope.dimension_count": 16}, "turns 16 of 32"),
        ({"llama.attention.scale": 0.5}, "attention scale"),
        ({"llama.attention.value_length": 16}, "different widths"),
        ({"llama.context_length": 0}, "max_positions must be 1 or more"),
        ({"llama.feed_forward_length": np.array([512, 512, 256], np.int32)}, "layer to layer"),
    ],
    ids=str,
)
def test_keys_that_contradict_the_model_are_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = read_gguf(tiny("llama", tmp_path / "m.gguf")[1])
    tensors = {n: (t.kind.name, t.shape, file.raw(n).tobytes()) for n, t in file.tensors.items()}
    path = write(tmp_path / "changed.gguf", file.keys | change, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_a_model_of_an_unknown_rope_table_is_refused(tmp_path: Path) -> None:
    file = read_gguf(tiny("llama", tmp_path / "m.gguf", rope_parameters=LLAMA3)[1])
    tensors = {n: (t.kind.name, t.shape, file.raw(n).tobytes()) for n, t in file.tensors.items()}
    odd = np.linspace(1, 9, 16, dtype=np.float32)
    tensors["rope_freqs.weight"] = ("F32", (16,), odd.tobytes())
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        load_config(write(tmp_path / "odd.gguf", file.keys, tensors))


def test_infinite_weights_are_named(tmp_path: Path) -> None:
    file = read_gguf(tiny("llama", tmp_path / "m.gguf", "Q8_0")[1])
    tensors = {n: (t.kind.name, t.shape, file.raw(n).tobytes()) for n, t in file.tensors.items()}
    kind, shape, content = tensors["blk.1.ffn_up.weight"]
    tensors["blk.1.ffn_up.weight"] = (kind, shape, b"\x00\x7c\x01" + content[3:])
    with pytest.raises(CheckpointError, match="'?blk.1.ffn_up.weight'? holds NaN or infinity"):
        load_model(write(tmp_path / "inf.gguf", file.keys, tensors))


def test_the_table_of_formats_is_that_of_the_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for number, kind in TYPES.items():
        assert GGMLQuantizationType(number).name == kind.name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (kind.block, kind.bytes)


def test_a_file_that_was_written_by_the_package_is_read(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    theirs, path = tiny("llama", tmp_path / "m.gguf")
    file = read_gguf(path)
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    for name, value in file.keys.items():
        if name.startswith("llama.") and isinstance(value, int):
            writer.add_uint32(name, value)
        elif name.startswith("llama."):
            writer.add_float32(name, value)
    for name, value in byte_words().items():
        if isinstance(value, (list, np.ndarray)):
            writer.add_array(name, list(value) if isinstance(value, list) else value.tolist())
        else:
            {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)](
                name, value
            )
    for name in file.tensors:
        writer.add_tensor(name, file.read(name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same_logits(theirs, load_model(tmp_path / "theirs.gguf"))


def test_every_architecture_is_tested() -> None:
    assert set(ARCHITECTURES) == {
        keys_of(f, hf_config(f))["general.architecture"] for f in FAMILIES
    }


def test_commands_take_a_gguf_file_for_a_model(tmp_path: Path) -> None:
    _, path = tiny("llama", tmp_path / "m.gguf", "Q8_0")
    text = tmp_path / "text.txt"
    text.write_text("the end of abcd and the beginning of 123\n" * 300)
    data = ["--data", str(text)]
    for words in (
        ["generate", str(path), "--prompt", "ab", "--max-tokens", "3", "--json"],
        ["generate", str(path), "--prompt", "ab", "--max-tokens", "3", "--quantize", "8"],
        ["info", str(path), "--json"],
        ["eval", str(path), *data, "--limit-bytes", "500", "--json"],
        ["verify", str(path), "--files", "--json"],
        ["quantize", str(path), "--out", str(tmp_path / "q"), *data, "--limit-bytes", "300"],
        ["generate", str(tmp_path / "q"), "--prompt", "ab", "--max-tokens", "3"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)


def test_heads_of_a_gguf_model_need_a_place_of_their_own(tmp_path: Path) -> None:
    from linspec.train.drafters import train_drafter

    _, path = tiny("llama", tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="give --out"):
        train_drafter(path, None)


def test_a_part_of_a_head_that_is_no_binary_fraction_was_turned_by_a_feature_less() -> None:
    for width in range(2, 257, 2):
        for turned in range(2, width + 1, 2):
            assert RopeConfig(partial_rotary_factor=share_of(turned, width)).turned(width) == turned
