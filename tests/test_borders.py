"""What comes from disk or a caller and could hurt: each entry was once a crash, a hang or silence."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer
from hostile import contents, workshop
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_model, save_model
from linspec.checkpoints.tensors import check_tensors
from linspec.cli import app
from linspec.decoding.step import StepInput
from linspec.errors import (
    CheckpointError,
    ConfigError,
    DrafterError,
    InputError,
    LinspecError,
    NotFinite,
    StateError,
    TrainingError,
    WrongType,
)
from linspec.evaluate.files import verify_files
from linspec.evaluate.perplexity import evaluate_source
from linspec.evaluate.quantize import quantize
from linspec.kernels.cpu.step import CpuStep
from linspec.kernels.cpu.structs import LinearStruct
from linspec.kernels.step_plan import INT8, AttentionPlan, PartPlan
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.linear import Quantizer
from linspec.models.native_linear import NativeLinear
from linspec.models.one_call import OneCall
from linspec.models.step_plan import step_plan
from linspec.policies.costs import load_or_measure
from linspec.quantization.rows import decode, encode
from linspec.train.drafters import DrafterConfig
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.saved_state import read_state
from linspec.utils.border import parse, read_json

SHORT = SamplingParams(max_tokens=3)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def retyped(path: Path, name: str, dtype: torch.dtype) -> None:
    """Give one tensor of a file another dtype, with values that fit."""
    tensors = load_file(path)
    assert name in tensors, sorted(tensors)
    save_file(tensors | {name: tensors[name].to(dtype)}, path)


def poisoned(path: Path, name: str, value: float = float("nan")) -> None:
    tensors = load_file(path)
    flat = tensors[name].flatten()
    flat[flat.numel() // 2] = value
    save_file(tensors, path)


# ---- tensors


@pytest.mark.parametrize(
    ("file", "name", "dtype"),
    [
        ("model.safetensors", "blocks.0.mixer.qkv.scales", torch.uint8),
        ("model.safetensors", "blocks.0.mixer.taps", torch.bfloat16),
        ("model.safetensors", "norm.weight", torch.bfloat16),
        ("model.safetensors", "embed.weight", torch.float32),
        ("medusa/drafter.safetensors", "blocks.0.first.0.bias", torch.uint8),
        ("medusa/drafter.safetensors", "blocks.0.first.0.scales", torch.uint8),
    ],
)
def test_quantized_tensors_of_a_wrong_dtype_were_read_past_their_end(
    file: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = copy_of(workshop("int8"), tmp_path)
    retyped(folder / file, name, dtype)
    with pytest.raises((CheckpointError, DrafterError), match=f"{name} has numbers of type"):
        LLM(folder, drafter="medusa")


def test_integers_in_place_of_weights_were_taken_for_floats(tmp_path: Path) -> None:
    folder = copy_of(model_dir("aug"), tmp_path)
    retyped(folder / "model.safetensors", "blocks.0.mixer.q.weight", torch.int32)
    with pytest.raises(CheckpointError, match="int32 where float32 belong"):
        load_model(folder)


@pytest.mark.parametrize("name", ["norm.weight", "blocks.0.mixer.alpha"])
def test_nan_in_a_small_tensor_is_refused_at_load(name: str, tmp_path: Path) -> None:
    folder = copy_of(model_dir("aug"), tmp_path)
    poisoned(folder / "model.safetensors", name)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        load_model(folder)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model with a matrix whose values are not looked at when it is loaded, and NaN in it."""
    config = text_model("aug").config.to_dict() | {"mlp_width": 5000}
    from linspec.models.decoder import Decoder

    model = Decoder(DecoderConfig.from_dict(config)).float()
    folder = save_model(model, tiny_tokenizer(), tmp_path / "large")
    poisoned(folder / "model.safetensors", "blocks.0.mlp.down.weight")
    return folder


def test_nan_in_any_weight_ended_in_an_empty_text_and_exit_0(large: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("abcd end the end\n" * 20)
    load_model(large)
    for drafter in ("none", "prompt-lookup"):
        with pytest.raises(NotFinite, match="verify MODEL --files"):
            LLM(large, drafter=drafter, policy=2).generate("abcd", SHORT)
    with pytest.raises(NotFinite, match="scores"):
        LLM(large).generate("abcd", SamplingParams(max_tokens=3, temperature=1.0))
    with pytest.raises(NotFinite, match="losses of the held-out text"):
        evaluate_source(large, [data])
    with pytest.raises(CheckpointError, match=r"mlp.down.weight holds NaN"):
        quantize(large, tmp_path / "out", data=[data])
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, ["generate", str(large), "--prompt", "x"])
    assert result.exit_code == 1 and "error: the scores of the next token" in result.stderr


# ---- checksums


def test_verify_files_reads_every_value(large: Path) -> None:
    (large / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"mlp.down.weight holds NaN"):
        verify_files(large)


@pytest.mark.parametrize("kind", ["llama", "aug", "int8", "int4"])
def test_a_changed_byte_is_found_by_verify_files(kind: str, tmp_path: Path) -> None:
    folder = copy_of(workshop(kind), tmp_path)
    sound = verify_files(folder)
    assert set(sound.checksums.values()) == {"match"} and len(sound.checksums) == 2
    assert sound.drafters == ("medusa",)
    path = folder / "medusa" / "drafter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the file that was written"):
        verify_files(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"drafter.safetensors is missing"):
        verify_files(folder)


def test_scales_between_4_bit_codes_are_checked_by_verify_files(tmp_path: Path) -> None:
    folder = copy_of(workshop("int4"), tmp_path)
    (folder / "checksums.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    packed = tensors["blocks.0.mlp.down.packed"]
    packed[0, 0, :2] = torch.tensor([0xC0, 0x7F], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down.packed holds NaN"):
        verify_files(folder)


def test_verify_files_on_the_command_line(tmp_path: Path) -> None:
    for model in ("embedded-softmax", "embedded-aug", str(workshop("int8"))):
        result = CliRunner().invoke(app, ["verify", model, "--files", "--json"])
        found = json.loads(result.stdout)
        assert found["sound"] and set(found["checksums"].values()) == {"match"}
    assert "tensors" in CliRunner().invoke(app, ["verify", model, "--files"]).stdout


# ---- tokenizers


def test_a_tokenizer_setting_of_a_wrong_type_showed_at_the_first_prompt(tmp_path: Path) -> None:
    folder = copy_of(model_dir("softmax"), tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"model_max_length": [1], "tokenizer_class": 5}))
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        LLM(folder)


def test_a_tokenizer_without_a_token_for_unknown_words(tmp_path: Path) -> None:
    folder = copy_of(model_dir("softmax"), tmp_path)
    path = folder / "tokenizer.json"
    data = read_json(path)
    data["model"] = {"type": "WordLevel", "vocab": {"a": 1, "b": 2}, "unk_token": "[UNK]"}
    data["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(data))
    (tmp_path / "data.txt").write_text("what nobody knows\n")
    with pytest.raises(InputError, match="cannot encode the prompt"):
        LLM(folder).generate("what nobody knows", SHORT)
    with pytest.raises(InputError, match="cannot encode the text"):
        evaluate_source(folder, [tmp_path / "data.txt"])


# ---- JSON


def own(change: dict[str, Any]) -> dict[str, Any]:
    data = json.loads(contents("aug")["config.json"])
    data["decoder"] |= change
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 10_000_000}, "layers must be at most"),
        ({"heads": 0}, "heads must be 1 or more, got 0"),
        ({"norm_eps": -1}, "norm_eps must be finite and 0 or more, got -1.0"),
        ({"width": "16"}, "decoder.*width should be a valid integer, got '16'"),
        ({"width": 16.5}, "width should be a valid integer, got 16.5"),
        ({"vocab_size": True}, "vocab_size should be a valid integer, got True"),
        ({"mixers": [{"name": "aug", "group": 16.5}] * 2}, r"mixers.0.group should be a valid"),
        ({"mixers": [{"name": "agu"}] * 2}, "did you mean 'aug'"),
        ({"mixers": [{"grup": 3}] * 2}, "mixers.0.grup is not an entry"),
        ({"mlp_width": 10**400}, "mlp_width must be at most"),
        ({"heads": 2**14, "kv_heads": 1, "head_width": 2**10}, "are more than"),
        ({"rope": {"theta": 0}}, "rope theta must be finite and above 0"),
        ({"eos_ids": [None]}, "eos_ids.0 should be a valid integer"),
    ],
)
def test_a_hostile_config_is_refused_at_once(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copy_of(model_dir("aug"), tmp_path)
    (folder / "config.json").write_text(json.dumps(own(change)))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": -1},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**7},
        {"hidden_size": None},
        {"rope_parameters": 5},
        {"intermediate_size": 16.5},
        {"hidden_act": []},
    ],
)
def test_a_hostile_hugging_face_config_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = copy_of(model_dir("softmax"), tmp_path)
    data = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(data | change))
    with pytest.raises(CheckpointError, match="config"):
        load_model(folder)


def test_a_dtype_that_is_none_is_named(tmp_path: Path) -> None:
    from linspec.train.linearize import stored_dtype

    folder = copy_of(model_dir("softmax"), tmp_path)
    for dtype in ("float99", "int8", 5):
        data = read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps(data | {"dtype": dtype}))
        with pytest.raises(CheckpointError, match="unknown dtype"):
            stored_dtype(folder)


@pytest.mark.parametrize(
    "accuracies", [None, 5, "abc", [None], [["a"]], [[2.0]], [[-0.1]], [[1], 2], {"a": 1}]
)
def test_hostile_accuracies_of_a_drafter(accuracies: object, tmp_path: Path) -> None:
    folder = copy_of(workshop("aug"), tmp_path)
    path = folder / "medusa" / "drafter.json"
    path.write_text(json.dumps(read_json(path) | {"accuracies": accuracies}))
    with pytest.raises(DrafterError, match="accuracies"):
        LLM(folder, drafter="medusa")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "[" * 100_000, '{"a": NaN}', '{"a": ' + "9" * 5000 + "}", "\ud800"]
)
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(path)
    with pytest.raises(TrainingError, match="no such file"):
        read_json(tmp_path / "nothing", TrainingError)


def test_what_cannot_be_json_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        parse(MixerConfig, {"group": {1, 2}}, "x")


@pytest.mark.parametrize(
    "stored",
    [
        "[]",
        "{}",
        # as it was written before curves were completed
        '{"1": 0.5}',
        '{"seconds": [], "measured": 1}',
        '{"seconds": {"1": -1}, "measured": 1}',
        '{"seconds": {"1": "x"}, "measured": 1}',
        '{"seconds": {"0": 1.0}, "measured": 1}',
        '{"seconds": {"1": 1.0}, "measured": "x"}',
    ],
)
def test_a_damaged_cost_curve_is_measured_again(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))
    model, seconds = text_model("aug"), itertools.count()
    curve = load_or_measure(model, lambda: float(next(seconds)))
    (file,) = (tmp_path / "costs").iterdir()
    file.write_text(stored)
    assert load_or_measure(model, lambda: float(next(seconds))) == curve
    assert json.loads(file.read_text())["seconds"]
    # a sound one is believed, and nothing is measured
    file.write_text('{"seconds": {"1": 0.5}, "measured": 1}')
    monkeypatch.setattr(model, "step", None)
    assert load_or_measure(model)(3) == 0.5


# ---- states of interrupted runs


def saved_run(folder: Path) -> dict[str, torch.Tensor]:
    named = {"w": torch.ones(2, 3)}
    meta = {"step": 1, "tokens": 2, "seconds": 0.5, "log": [{"loss": 1}], "config": {}}
    (folder / "state.json").write_text(json.dumps(meta))
    tensors = {"weight.w": torch.ones(2, 3), "moment.0.0.exp_avg": torch.ones(2, 3)}
    save_file(tensors | {"moment.0.0.step": torch.tensor(1.0)}, folder / "state.safetensors")
    return named


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: (d / "state.safetensors").write_bytes(b"x"),
        lambda d: (d / "state.json").write_text('{"step": -1}'),
        lambda d: (d / "state.json").write_text('{"step": "x", "tokens": 1}'),
        lambda d: retyped(d / "state.safetensors", "weight.w", torch.int32),
        lambda d: poisoned(d / "state.safetensors", "weight.w"),
        lambda d: poisoned(d / "state.safetensors", "moment.0.0.exp_avg", float("inf")),
        lambda d: save_file({"weight.w": torch.ones(3, 2)}, d / "state.safetensors"),
        lambda d: save_file({"weight.other": torch.ones(2, 3)}, d / "state.safetensors"),
        lambda d: save_file(
            {"weight.w": torch.ones(2, 3), "moment.0.0.exp_avg": torch.ones(7)},
            d / "state.safetensors",
        ),
    ],
)
def test_a_damaged_training_state_is_not_resumed(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    named = saved_run(tmp_path)
    assert read_state(tmp_path, named)[0].step == 1
    spoil(tmp_path)
    with pytest.raises(TrainingError):
        read_state(tmp_path, named)


# ---- sizes and the C library


def test_a_group_and_span_beyond_memory_are_refused_before_they_take_it() -> None:
    shape = {"vocab_size": 8, "width": 4, "layers": 1, "heads": 1, "kv_heads": 1}
    mixer = MixerConfig(name="grouped", group=65536, span=2**23, kernel="softmax")
    config = DecoderConfig(**shape, head_width=4, mlp_width=4, mixers=(mixer,))
    from linspec.models.decoder import Decoder

    with pytest.raises(StateError, match="GiB of memory"):
        Decoder(config).new_state(1)


def test_a_group_and_span_whose_product_needs_64_bits_decode_as_a_cache_does() -> None:
    """65536 x 65536 overflowed to 0 in C: rows in reach were left out."""
    from linspec.models.decoder import Decoder

    outputs = []
    for mixer in (MixerConfig(), MixerConfig(name="grouped", kernel="softmax", group=2**16)):
        shape = {"vocab_size": 8, "width": 4, "layers": 1, "heads": 1, "kv_heads": 1}
        config = DecoderConfig(**shape, head_width=4, mlp_width=4, mixers=(mixer,))
        torch.manual_seed(0)
        model = Decoder(config).to_inference()
        state = model.new_state(1)
        if model.native is not None and mixer.group == 2**16:
            # more than a configuration allows
            plan = step_plan(model)
            far = PartPlan((0,), AttentionPlan(group=2**16, span=2**16))
            wide = replace(plan.layers[0], parts=(far,))
            model.native = OneCall(CpuStep(replace(plan, layers=(wide,))))
        model.step([StepInput(0, [1, 2, 3])], state)
        state.commit(0, range(3))
        outputs.append(model.step([StepInput(0, [4])], state).logits)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_numbers_that_the_c_side_cannot_hold_are_not_cut_off() -> None:
    with pytest.raises(StateError, match="inputs is 4294967297"):
        LinearStruct(inputs=2**32 + 1)
    assert LinearStruct(inputs=5).inputs == 5


def test_a_packed_layer_of_other_tensors_never_reaches_c() -> None:
    codes = torch.zeros(1, 8, 32, 4, dtype=torch.uint8)
    NativeLinear(INT8, 4, 8, codes, torch.zeros(32)).struct()
    for scales in (None, torch.zeros(4), torch.zeros(32, dtype=torch.uint8), torch.zeros(64)[::2]):
        with pytest.raises(StateError, match="scales of a layer of 4 outputs"):
            NativeLinear(INT8, 4, 8, codes, scales).struct()


@pytest.mark.parametrize("value", [1e-42, 1e-38, float("nan"), float("inf"), 3e38])
def test_activations_without_an_inverse_overflowed_the_sum_of_their_codes(value: float) -> None:
    """Sums of codes overflowed, which the sanitizers refuse; NaN must come out as NaN, the rest finite."""
    weights = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        linear = torch.nn.Linear(40, 4, bias=False)
        linear.weight = torch.nn.Parameter(weights, requires_grad=False)
        layer = Quantizer(bits, {})(linear)
        x = torch.zeros(2, 40)
        x[0, 3] = value
        y = layer(x)
        assert bool(y[1].eq(0).all())
        assert bool(y[0].isfinite().all()) == bool(torch.isfinite(x).all()) or value == 3e38
    rows = decode(encode(torch.full((2, 8), value)), 8, torch.float32)
    assert bool(rows.isfinite().all()) == bool(torch.tensor(value).isfinite())


@pytest.mark.parametrize("token", [-1, 10**6, 2**70])
def test_a_step_with_foreign_tokens_read_other_memory(token: int) -> None:
    model = text_model("aug").to_inference()
    with pytest.raises((InputError, IndexError, RuntimeError)):
        model.step([StepInput(0, [token])], model.new_state(1))


@pytest.mark.parametrize("kind", ["aug", "int8"])
def test_tensors_at_odd_places_of_a_mapped_file_are_moved(kind: str, tmp_path: Path) -> None:
    """C reads floats at addresses that floats can have."""
    folder = copy_of(workshop(kind), tmp_path)
    for path in (folder / "model.safetensors", folder / "medusa" / "drafter.safetensors"):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        # a header that is a byte longer
        header = content[8 : 8 + length] + b" "
        path.write_bytes(struct.pack("<Q", length + 1) + header + content[8 + length :])
    llm = LLM(folder, drafter="medusa", policy=2)
    assert len(llm.generate("abcd", SHORT)[0].token_ids) == 3
    for tensor in llm.model.state_dict().values():
        assert tensor.data_ptr() % tensor.itemsize == 0


def test_a_file_whose_header_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    folder = copy_of(workshop("int8"), tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_model(folder)


# ---- Python


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(model_dir("aug"), max_batch=2)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ([-1], InputError),
        ([2**70], InputError),
        ([5, 10**9], InputError),
        (b"abc", WrongType),
        (bytearray(b"abc"), WrongType),
        ([b"abc"], WrongType),
        (5, WrongType),
        (None, WrongType),
        ([None], WrongType),
        ([1.5], WrongType),
        ([[1, "a"]], WrongType),
        ([[True, False]], WrongType),
        ({"text": "x"}, WrongType),
        ([], InputError),
        ([[]], InputError),
        ("", InputError),
        ("\ud800", InputError),
    ],
)
def test_prompts_that_are_none(llm: LLM, prompt: Any, kind: type[LinspecError]) -> None:
    with pytest.raises(kind) as found:
        llm.generate(prompt, SHORT)
    assert isinstance(found.value, TypeError if kind is WrongType else ValueError)


def test_token_ids_of_every_library_are_the_same_prompt(llm: LLM) -> None:
    ids = [5, 6, 7]
    (expected,) = llm.generate(ids, SHORT)
    forms = (tuple(ids), np.array(ids), torch.tensor(ids), [np.int32(i) for i in ids], iter(ids))
    for form in forms:
        (found,) = llm.generate(form, SHORT)
        assert found.token_ids == expected.token_ids
    assert len(llm.generate(np.array([ids, ids]), SHORT)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_batch": 10**9},
        {"max_batch": "8"},
        {"prefill_tokens": 0},
        {"prefill_tokens": -5},
        {"device": "cuda:77"},
        {"device": "tpu"},
        {"device": None},
        {"kv": "int3"},
        {"quantize": 5},
        {"drafter": 5},
        {"drafter": "prompt-lookup", "policy": 2.5},
        {"drafter": "prompt-lookup", "policy": -1},
        {"verifier": None},
        {"verifier": []},
    ],
)
def test_settings_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(LinspecError):
        LLM(model_dir("aug"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(
        ConfigError, match=r"no CUDA device can be used as 'cuda': 0 are here.*use cpu"
    ):
        LLM(model_dir("aug"), device="cuda")


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": "5"},
        {"max_tokens": 2.5},
        {"temperature": "hot"},
        {"top_k": None},
        {"top_p": "x"},
        {"seed": 1.5},
        {"logprobs": "x"},
        {"logit_bias": 5},
        {"logit_bias": {"a": 1.0}},
        {"stop": 5},
        {"stop": b"x"},
        {"stop": [5]},
    ],
)
def test_sampling_settings_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**options)


def test_params_that_are_none(llm: LLM) -> None:
    for params in (5, "x", [5], {"max_tokens": 3}):
        with pytest.raises(LinspecError):
            llm.generate("abcd", params)  # type: ignore[arg-type]


# ---- found by using it as a stranger


def test_a_mistyped_data_source_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        linearize("embedded-softmax", tmp_path / "out", data=[tmp_path / "none.txt"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [LinearizeConfig, DrafterConfig])
def test_a_senseless_compile_is_refused_where_it_is_set(config: type) -> None:
    with pytest.raises(ConfigError, match="compile must be auto, on or off, got 'bogus'"):
        config(compile="bogus")


def test_closed_standard_output_is_an_error_and_no_success() -> None:
    command = f"{sys.executable} -m linspec list >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and "standard output is closed" in done.stderr


def test_scales_below_zero_are_refused(tmp_path: Path) -> None:
    scales = torch.tensor([1.0, -1.0])
    with pytest.raises(CheckpointError, match="scales below 0"):
        check_tensors({"a.scales": scales}, {"a.scales": scales}, tmp_path)


def test_numbers_of_numpy_are_numbers_in_settings_too() -> None:
    found = SamplingParams(max_tokens=np.int64(3), allowed_token_ids=np.array([5, 6]))
    assert found.max_tokens == 3 and type(found.max_tokens) is int
    assert found.allowed_token_ids == (5, 6)


def test_words_of_spaces_can_be_bad_words() -> None:
    text = LLM("embedded-aug").generate("import os", SamplingParams(max_tokens=24))[0].text
    assert "\n" in text
    banned = SamplingParams(max_tokens=24, bad_words=["\n"])
    llm = LLM("embedded-aug")
    newline = llm.encode("\n", add_special_tokens=False)
    assert len(newline) == 1
    assert newline[0] not in llm.generate("import os", banned)[0].token_ids


@pytest.mark.parametrize(
    "call",
    [
        lambda: LLM(None),
        lambda: LLM(5, tokenizer=tiny_tokenizer()),
        lambda: LLM(torch.nn.Linear(2, 2), tokenizer=tiny_tokenizer()),
        lambda: load_model(b"embedded-aug"),
        lambda: load_model(""),
        lambda: load_model("a" * 5000),
        lambda: quantize("embedded-aug", 5),
        lambda: linearize("embedded-softmax", None),
    ],
)
def test_what_is_no_model_or_place_is_said_by_linspec(call: Callable[[], object]) -> None:
    with pytest.raises(LinspecError, match="got|names no model directory|longer than"):
        call()


@pytest.mark.parametrize(
    "make", [os.mkfifo, partial(os.symlink, "/dev/zero")], ids=["pipe", "device"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pipe_among_the_files_of_a_model_was_waited_for(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir("softmax"), folder)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a pipe or a device"):
        LLM(folder)


def test_a_name_of_the_hub_says_how_to_fetch_it() -> None:
    with pytest.raises(CheckpointError, match=r"hf download some-org/Some-1\.5B --local-dir DIR"):
        LLM("some-org/Some-1.5B")
