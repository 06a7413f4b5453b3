"""Between Hugging Face directories and GGUF files: the same weights, ids and logits on the other side."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import model_dir, scratch, text_model, tiny_tokenizer
from gguf_files import byte_words, hf_config, sentence_words, write
from tokenizer_kinds import KINDS, tokenizer_of
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.checkpoints import convert as module
from linspec.checkpoints.convert import convert
from linspec.checkpoints.gguf.cut_names import PROBES, WRITTEN, cut_name
from linspec.checkpoints.gguf.model import load_gguf
from linspec.checkpoints.gguf.pre_tokenizers import (
    PATTERNS,
    WHOLE_PIECES,
    normalizer,
    pre_tokenizer,
)
from linspec.checkpoints.gguf.reader import read_gguf
from linspec.checkpoints.gguf.tokenizer import load_gguf_tokenizer, read_tokenizer
from linspec.checkpoints.gguf.types import TYPES
from linspec.checkpoints.gguf.writer import Plan
from linspec.checkpoints.hub import load_config, load_model, load_tokenizer, save_model
from linspec.checkpoints.load_quantized import quantize_model
from linspec.checkpoints.packages import PACKAGES
from linspec.checkpoints.quantized import save_quantized
from linspec.cli import app
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.utils.places import MARK

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
NUMBERS = {kind.name: number for number, kind in TYPES.items()}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e4,
}
TEXT = "abcd end the 12345 I'll DON'T é 日本 🙂 <tool><|end|>  x\r\n\ty"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def words(folder: Path, **changes: Any) -> Any:
    """The tokenizer of the tests' GGUF files, as transformers' class."""
    rows = np.zeros((288, 32), np.float32)
    tensors = {"token_embd.weight": ("F32", rows.shape, rows.tobytes())}
    keys = {"general.architecture": "llama", **byte_words(), **changes}
    return load_gguf_tokenizer(write(folder / "words.gguf", keys, tensors))


def directory(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random model of transformers as it saves it, with a tokenizer beside it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(hf_config(family, **changes)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            # norms and biases of a new model are ones and zeros, which hide mistakes
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    made = words(folder.parent)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory("llama", tmp_path_factory.mktemp("llama") / "llama")


def state(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


# ---- there and back


@pytest.mark.parametrize("family", FAMILIES)
def test_f16_and_back_gives_the_weights_rounded_to_f16(family: str, tmp_path: Path) -> None:
    source = directory(family, tmp_path / "source")
    done = convert(source, tmp_path / "m.gguf")
    assert done.format == "gguf" and done.tensors.keys() == {"F16", "F32"}
    convert(tmp_path / "m.gguf", tmp_path / "again")
    before, after = state(source), state(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        whole = tensor.ndim == 1 or name == "transformer.wpe.weight"
        expected = tensor if whole else tensor.half().float()
        assert torch.equal(after[name], expected), name
    there, back = AutoTokenizer.from_pretrained(source), load_tokenizer(tmp_path / "again")
    assert there(TEXT)["input_ids"] == back(TEXT)["input_ids"]
    assert back.chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXT) == there(TEXT)
    assert load_config(tmp_path / "again").eos_ids == load_config(source).eos_ids


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_logits_of_f32_and_back_are_those_of_the_original(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = directory(family, tmp_path / "source", **changes)
    convert(source, tmp_path / "m.gguf", kind="f32")
    convert(tmp_path / "m.gguf", tmp_path / "again")
    ids = torch.arange(5, 45)[None]
    models = [AutoModelForCausalLM.from_pretrained(p).eval() for p in (source, tmp_path / "again")]
    with torch.no_grad():
        expected, found = (model(ids).logits for model in models)
    assert float((expected - found).abs().max()) <= 1e-4
    again = load_gguf(tmp_path / "m.gguf", torch.float32).config
    # two ways to say the same rope: the numbers are those of float32 in the file
    assert again.rope == load_config(source).rope and again.mixers == load_config(source).mixers


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_are_read_back_as_the_package_dequantizes_them(
    family: str, kind: str, tmp_path: Path
) -> None:
    source = directory(family, tmp_path / "source")
    done = convert(source, tmp_path / "m.gguf", kind=kind)
    assert kind.upper() in done.tensors
    ours, theirs = read_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert [each.name for each in theirs.tensors] == list(ours.tensors)
    for each in theirs.tensors:
        expected = gguf.dequantize(each.data, each.tensor_type)
        found = ours.read(each.name).float().numpy()
        assert np.array_equal(found, expected.reshape(found.shape)), each.name
    closest = {"q8_0": 0.02, "q4_0": 0.2, "bf16": 0.01}[kind]
    before, after = load_model(source), load_gguf(tmp_path / "m.gguf", torch.float32)
    for (name, one), two in zip(before.named_parameters(), after.parameters(), strict=True):
        assert float(((one - two).norm() / one.norm()).detach()) <= closest, name


def test_a_bfloat16_model_is_kept_exactly_in_bf16(tmp_path: Path) -> None:
    source = directory("llama", tmp_path / "source", torch.bfloat16)
    convert(source, tmp_path / "m.gguf", kind="bf16")
    convert(tmp_path / "m.gguf", tmp_path / "again", dtype="bfloat16")
    before, after = state(source), state(tmp_path / "again")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_rows_that_make_no_whole_blocks_stay_float16(tmp_path: Path) -> None:
    made = text_model("softmax")
    source = save_model(made, tiny_tokenizer(), tmp_path / "source")
    done = convert(source, tmp_path / "m.gguf", kind="q8_0")
    width = made.config.width
    assert ("F16" in done.tensors) == (width % 32 != 0 or made.config.mlp_width % 32 != 0)
    assert load_model(tmp_path / "m.gguf").config.width == width


def test_greedy_tokens_are_those_of_the_same_values(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "m.gguf", kind="q8_0")
    convert(tmp_path / "m.gguf", tmp_path / "again")
    params = SamplingParams(max_tokens=24)
    for prompt in ("abcd end", "the 12", "<|start|>ab"):
        # in floats: kept blocks round their inputs
        models = (LLM(tmp_path / name, dtype="float32") for name in ("m.gguf", "again"))
        a, b = (model.generate(prompt, params)[0] for model in models)
        assert a.token_ids == b.token_ids


# ---- tokenizers


@pytest.mark.parametrize("name", WRITTEN)
def test_every_written_cut_is_found_again_by_what_it_does(name: str) -> None:
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizer(name, Path(name))
    if (changed := normalizer(name)) is not None:
        backend.normalizer = changed
    assert cut_name(backend, name in WHOLE_PIECES, Path("x")) == name


@pytest.mark.parametrize("pair", list(combinations(PATTERNS, 2)), ids="-".join)
def test_the_probes_tell_all_cuts_apart(pair: tuple[str, str]) -> None:
    cuts = [pre_tokenizer(name, Path(name)) for name in pair]
    assert any(cuts[0].pre_tokenize_str(text) != cuts[1].pre_tokenize_str(text) for text in PROBES)


QWEN2 = PATTERNS["qwen2"][0]


@pytest.mark.parametrize(
    "cut",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        *(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            for pattern in (
                QWEN2.replace(r"\p{N}|", r"\p{N}{1,2}|"),
                QWEN2.replace("(?i:", "(?:"),
                QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+"),
            )
        ),
        None,
    ],
    ids=["prefix", "nothing", "two digits", "cases", "marks", "none"],
)
def test_a_cut_without_a_name_is_refused_before_any_work(
    cut: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    made = words(tmp_path)
    backend = made.backend_tokenizer
    backend.pre_tokenizer = cut
    made.save_pretrained(source)
    monkeypatch.setattr(Plan, "write", None)
    with pytest.raises(UnsupportedModel, match=r"has no llama\.cpp name \(tokenizer\.ggml\.pre\)"):
        convert(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_tokens_around_a_text_and_all_its_ends_are_kept(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    words(tmp_path, **{"tokenizer.ggml.add_bos_token": True}).save_pretrained(source)
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | {"eos_token_id": [5, 0, 7]}))
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "m.gguf")
    keys = read_gguf(tmp_path / "m.gguf").keys
    assert keys["tokenizer.ggml.eos_token_id"] == 0 and keys["tokenizer.ggml.add_bos_token"] is True
    assert set(load_config(tmp_path / "m.gguf").eos_ids) == {0, 5, 7}
    for text in ("", "ab"):
        assert load_tokenizer(tmp_path / "m.gguf")(text)["input_ids"][:1] == [1]


def test_more_ends_than_there_are_keys_are_told(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | {"eos_token_id": [5, 0, 7, 9]}))
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "m.gguf")
    assert "[9]" in caplog.text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces_keep_their_ids(prefix: bool, tmp_path: Path) -> None:
    keys = sentence_words(**{"tokenizer.ggml.add_space_prefix": prefix})
    rows = np.zeros((len(keys["tokenizer.ggml.tokens"]), 32), np.float32)
    tensors = {"token_embd.weight": ("F32", rows.shape, rows.tobytes())}
    path = write(tmp_path / "w.gguf", {"general.architecture": "llama", **keys}, tensors)
    made = load_gguf_tokenizer(path)
    source = directory("llama", tmp_path / "source", vocab_size=len(rows) + 3)
    made.save_pretrained(source)
    convert(source, tmp_path / "m.gguf")
    again = load_tokenizer(tmp_path / "m.gguf")
    for text in (*PROBES, "abend the nab", "日 ab  ab", "<s>ab</s>"):
        assert made(text)["input_ids"] == again(text)["input_ids"]
    kinds = read_gguf(tmp_path / "m.gguf").keys["tokenizer.ggml.token_type"].tolist()
    # rows of the embedding that no token has are unused
    assert kinds == [*keys["tokenizer.ggml.token_type"], 5, 5, 5]


def test_merges_that_are_no_order_of_scores_are_refused(tmp_path: Path) -> None:
    source = directory("llama", tmp_path / "source", vocab_size=400)
    tokenizer_of("byte-fallback").save_pretrained(source)
    with pytest.raises(UnsupportedModel, match="would give other ids than its own for 'ab'"):
        convert(source, tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"byte-level", "byte-fallback"}))
def test_other_kinds_of_tokenizers_are_refused(kind: str, tmp_path: Path) -> None:
    source = directory("llama", tmp_path / "source", vocab_size=400)
    tokenizer_of(kind).save_pretrained(source)
    with pytest.raises(UnsupportedModel, match="cannot be written as GGUF"):
        convert(source, tmp_path / "m.gguf")


def test_a_token_that_takes_the_space_before_it_is_refused(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    made = words(tmp_path)
    made.backend_tokenizer.add_tokens([AddedToken("<lost>", lstrip=True, normalized=False)])
    made.save_pretrained(source)
    with pytest.raises(UnsupportedModel, match="would give other ids than its own"):
        convert(source, tmp_path / "m.gguf")


# ---- what no GGUF file can say


def quantized_dir() -> Path:
    made, folder = text_model("softmax"), scratch("quantized") / "q"
    quantize_model(made, 8, {})
    with save_quantized(made, tiny_tokenizer(), folder, 8, {}):
        pass
    return folder


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (lambda: model_dir("aug"), "mixers aug; a GGUF file has no tensors or keys for them"),
        (lambda: "smollm2-aug", "a delta of another model"),
        (quantized_dir, "weights of linspec's own integers"),
    ],
    ids=["linearized", "delta", "quantized"],
)
def test_models_of_linspec_are_refused_with_the_reason(
    source: Any, told: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        convert(source(), tmp_path / "m.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("qwen3", {"attention_bias": True}, "has no GGUF form"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "windows of",
        ),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "not those of Llama 3"),
    ],
)
def test_settings_that_a_file_would_not_say_are_named(
    family: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    source = directory(family, tmp_path / "source", **changes)
    with pytest.raises(UnsupportedModel, match=told):
        convert(source, tmp_path / "m.gguf")


@pytest.mark.parametrize(("kind", "fits"), [("f16", False), ("q8_0", True), ("bf16", True)])
def test_a_weight_beyond_f16_became_infinite(kind: str, fits: bool, tmp_path: Path) -> None:
    made = text_model("softmax")
    with torch.no_grad():
        made.blocks[0].mlp.down.weight[0, 0] = 1e5
    source = save_model(made, tiny_tokenizer(), tmp_path / "source")
    if fits and made.config.mlp_width % 32 == 0:
        convert(source, tmp_path / "m.gguf", kind=kind)
        assert load_model(tmp_path / "m.gguf").blocks[0].mlp.down.weight[0, 0] > 9e4
    elif not fits:
        with pytest.raises(
            CheckpointError, match=r"ffn_down\.weight has a weight of 100000, and F16"
        ):
            convert(source, tmp_path / "m.gguf", kind=kind)


# ---- places and the verb


def test_a_file_obeys_the_rules_of_places(llama: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "m.gguf"
    convert(llama, out)
    with pytest.raises(ConfigError, match="by `linspec convert` before; give --overwrite"):
        convert(llama, out)
    convert(llama, out, kind="q8_0", overwrite=True)
    assert f"overwriting {out}" in capsys.readouterr().err
    assert read_gguf(out).keys["general.file_type"] == 7
    foreign = write(tmp_path / "foreign.gguf", byte_words() | {"general.architecture": "llama"}, {})
    (tmp_path / "text.gguf").write_text("mine")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.gguf").mkdir()
    for path in (foreign, tmp_path / "text.gguf", tmp_path / "link.gguf", tmp_path / "folder.gguf"):
        with pytest.raises(ConfigError, match="name another file|a file that is new"):
            convert(llama, path, overwrite=True)
    with pytest.raises(ConfigError, match="lies inside"):
        convert(llama, llama / "m.gguf")
    with pytest.raises(ConfigError, match="cannot be made"):
        convert(llama, tmp_path / "text.gguf" / "m.gguf")
    assert (tmp_path / "text.gguf").read_text() == "mine" and foreign.read_bytes()[:4] == b"GGUF"


def test_a_directory_obeys_the_rules_of_places(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "again")
    assert json.loads((tmp_path / "again" / MARK).read_text())["kind"] == "convert"
    with pytest.raises(ConfigError, match="before; give --overwrite"):
        convert(tmp_path / "m.gguf", tmp_path / "again")
    convert(tmp_path / "m.gguf", tmp_path / "again", dtype="float16", overwrite=True)
    assert state(tmp_path / "again")["lm_head.weight"].dtype == torch.float16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that"):
        convert(tmp_path / "m.gguf", tmp_path / "mine", overwrite=True)


@pytest.mark.parametrize("there", [False, True])
def test_ctrl_c_leaves_nothing(
    there: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    if there:
        convert(llama, out)
    before = out.read_bytes() if there else b""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Progress, "update", stop)
    found = CliRunner().invoke(app, ["convert", str(llama), str(out), "--overwrite"])
    assert found.exit_code == 130 and "nothing was changed" in found.stderr
    assert [p.name for p in tmp_path.iterdir()] == (["m.gguf"] if there else [])
    assert not there or out.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("{llama}", "m.gguf", "--type", "q5"), "--type must be one of f32, f16"),
        (("{llama}", "m.gguf", "--dtype", "float16"), "a GGUF file takes --type"),
        (("{llama}", "out"), "call it out.gguf"),
        (("{llama}", "."), "must name a new directory"),
        (("{file}", "out", "--type", "f16"), "a directory takes --dtype"),
        (("{file}", "out", "--dtype", "int8"), "dtype must be one of"),
        (("{file}", "n.gguf"), "llama-quantize"),
        (("{file}.none", "out"), "is not a directory"),
    ],
    ids=str,
)
def test_wrong_usage_ends_in_one_line(
    args: tuple[str, ...], told: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "f.gguf", byte_words() | {"general.architecture": "llama"}, {})
    found = CliRunner().invoke(app, ["convert", *(a.format(llama=llama, file=file) for a in args)])
    assert found.exit_code in (1, 2) and found.stdout == ""
    assert told in found.stderr and found.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f.gguf"]


def test_the_verb_says_what_it_wrote(llama: Path, tmp_path: Path) -> None:
    args = ["convert", str(llama), str(tmp_path / "m.gguf"), "--type", "q8_0"]
    found = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert found["format"] == "gguf" and found["tensors"]["Q8_0"] > found["tensors"]["F32"]
    assert found["megabytes"] == (tmp_path / "m.gguf").stat().st_size / 1e6
    assert "linspec generate" in CliRunner().invoke(app, [*args, "--overwrite"]).stderr


# ---- llama.cpp reads what was written


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_llama_cpp_decodes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    api = pytest.importorskip(
        "llama_cpp",
        reason="llama.cpp's Python binding is not installed (pip install llama-cpp-python)",
    )
    convert("embedded-softmax", tmp_path / "m.gguf", kind=kind)
    theirs = api.Llama(str(tmp_path / "m.gguf"), n_ctx=256, verbose=False)
    llm = LLM(tmp_path / "m.gguf")
    for prompt in ("class Stack:\n    def push(", "import os\n", "for i in range(10):"):
        ids = llm.encode(prompt)
        assert theirs.tokenize(prompt.encode(), add_bos=True, special=True) == list(ids)
        ours = llm.generate(prompt, SamplingParams(max_tokens=32))[0].token_ids
        found = theirs.generate(list(ids), temp=0.0, reset=True)
        assert [next(found) for _ in ours] == list(ours)


# ---- the real model


SMOLLM2 = PACKAGES["smollm2"].path


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_file(), reason="no SmolLM2 here; run `linspec get smollm2`")
def test_smollm2_as_a_directory_answers_as_the_file_does(tmp_path: Path) -> None:
    convert(SMOLLM2, tmp_path / "smollm2")
    there, back = (LLM(each, dtype="float32") for each in (SMOLLM2, tmp_path / "smollm2"))
    params = SamplingParams(max_tokens=32)
    for prompt in ("The capital of France is", "def add(a, b):\n", "Once upon a time, in 1789,"):
        expected, found = (llm.generate(prompt, params)[0].token_ids for llm in (there, back))
        assert found == expected
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2").eval()
    ids = torch.tensor([there.encode("The capital of France is Paris, and the year is 1789.")])
    with torch.no_grad():
        expected, ours = theirs(ids).logits, load_model(SMOLLM2)(ids)
    # logits are of the order of 30
    assert float((expected - ours).abs().max()) <= 1e-4
    convert(tmp_path / "smollm2", tmp_path / "again.gguf", kind="f32")
    a, b = read_gguf(SMOLLM2), read_gguf(tmp_path / "again.gguf")
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors if name in b.tensors)
    assert a.keys["tokenizer.ggml.pre"] == b.keys["tokenizer.ggml.pre"] == "smollm"
    assert read_tokenizer(a).get_vocab() == read_tokenizer(b).get_vocab()
