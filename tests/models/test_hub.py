"""Model directories: both formats, and every way in which one can be broken."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from linspec.checkpoints import config_file, hub
from linspec.checkpoints.hub import (
    check_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    save_model,
)
from linspec.checkpoints.weights import INDEX, SINGLE
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.softmax import Softmax
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

PLAIN = DecoderConfig(
    vocab_size=20,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    eos_ids=(0,),
    bos_id=0,
)
OWN = PLAIN.with_mixers((MixerConfig(name="scaled", group=8, taps=2), MixerConfig()))


class Scaled(Softmax):
    """A mixer with a parameter and a buffer that no Hugging Face family has."""

    def __init__(self, config: DecoderConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.gain = nn.Parameter(torch.ones(self.heads))
        self.register_buffer("count", torch.tensor(3))

    def mix(self, *tensors: torch.Tensor | None) -> torch.Tensor:
        return super().mix(*tensors) * self.gain[:, None, None]


@pytest.fixture(autouse=True)
def scaled_mixer() -> Iterator[None]:
    """Registers `scaled` for one test."""
    MIXERS.register("scaled", summary="test", paper="none")(Scaled)
    yield
    MIXERS.forget("scaled")


def make(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = Decoder(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def make_tokenizer(size: int = 20) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(size - 1)} | {"<eos>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plain Llama directory."""
    return save_model(make(PLAIN), make_tokenizer(), tmp_path / "model")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_own_format_gives_back_the_same_model(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(replace(OWN, tied_embeddings=tied)).to(dtype)
    save_model(model, make_tokenizer(), tmp_path / "m")
    data = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (data["model_type"], data["architectures"]) == ("linspec", ["LinspecForCausalLM"])
    assert (data["hidden_size"], data["eos_token_id"]) == (16, 0)
    assert data["dtype"] == str(dtype).removeprefix("torch.")
    again = load_model(tmp_path / "m", dtype=dtype)
    assert again.config == model.config
    assert (again.head.weight is again.embed.weight) == tied
    assert not again.training
    assert_same(model, again)
    assert again.blocks[0].mixer.count.item() == 3
    ids = torch.arange(7)[None]
    assert torch.equal(model(ids), again(ids))


@pytest.mark.parametrize("name", MIXERS.names())
def test_every_mixer_can_be_saved_and_loaded(name: str, tmp_path: Path) -> None:
    mixer = MixerConfig(name=name, group=8, taps=3, window=4)
    model = make(PLAIN.with_mixers((mixer, mixer)))
    save_model(model, None, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config
    assert_same(again, model)


def test_loaded_weights_can_be_trained_and_are_not_tied_to_the_file(saved: Path) -> None:
    before = files(saved)
    model = load_model(saved)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    with torch.no_grad():
        model.embed.weight.zero_()
    assert files(saved) == before


def test_saving_converts_to_the_dtype_asked_for(tmp_path: Path) -> None:
    model = make(PLAIN)
    save_model(model, None, tmp_path / "m", dtype=torch.bfloat16)
    assert model.embed.weight.dtype == torch.float32
    assert_same(load_model(tmp_path / "m", dtype=torch.bfloat16), model.to(torch.bfloat16))


@pytest.mark.parametrize("config", [PLAIN, OWN])
def test_large_models_are_sharded(config: DecoderConfig, tmp_path: Path) -> None:
    model = make(config)
    save_model(model, None, tmp_path / "m", shard_bytes=2000)
    assert (tmp_path / "m" / INDEX).exists()
    assert not (tmp_path / "m" / SINGLE).exists()
    assert_same(load_model(tmp_path / "m"), model)


def test_saving_over_a_model_replaces_it_whole_where_that_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "m"
    save_model(make(PLAIN), make_tokenizer(), out, shard_bytes=2000)
    other = make(OWN, seed=1)
    with pytest.raises(ConfigError, match="`save_model` before; give --overwrite"):
        save_model(other, make_tokenizer(), out)
    save_model(other, make_tokenizer(), out, extra_files={"recipe.json": "{}"}, overwrite=True)
    assert_same(load_model(out), other)
    assert not list(out.glob("model-*.safetensors"))
    assert not (out / INDEX).exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"did not write: notes\.txt"):
        save_model(make(PLAIN), None, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_failure_while_saving_leaves_the_old_model(
    failure: type[BaseException], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure("no space left")

    before = files(saved.parent)
    # the tokenizer is written behind the weights
    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(CheckpointError if failure is OSError else failure, match="no space left"):
        save_model(make(PLAIN, seed=1), tokenizer, saved, overwrite=True)
    with pytest.raises(BaseException, match="no space left"):
        save_model(make(PLAIN, seed=1), tokenizer, saved.parent / "new")
    assert files(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(saved: Path) -> None:
    model = load_model(saved)
    save_model(model, None, saved, overwrite=True)
    assert_same(load_model(saved), model)
    assert_same(model, make(PLAIN))


@pytest.mark.parametrize("config", [PLAIN, OWN])
def test_tokenizer_roundtrip(config: DecoderConfig, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_model(make(config), tokenizer, tmp_path / "m")
    again = load_tokenizer(tmp_path / "m")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.encode("w3 w5") == [3, 5]
    assert again.eos_token_id == 19
    assert again.chat_template == tokenizer.chat_template
    if config is PLAIN:
        assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("w3 w5") == [3, 5]


def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    check_tokenizer(make_tokenizer(20), PLAIN)
    with pytest.raises(CheckpointError, match="21 entries but the model embeds 20"):
        check_tokenizer(make_tokenizer(21), PLAIN)
    with pytest.raises(CheckpointError, match="21 entries"):
        save_model(make(PLAIN), make_tokenizer(21), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_tokenizer_of_an_ordinary_model_without_tokenizer_json(saved: Path) -> None:
    edit_config(saved, model_type="gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    (saved / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (saved / "merges.txt").write_text("#version: 0.2\na b\n")
    assert load_tokenizer(saved).encode("aba") == [2, 0]


def test_missing_or_malformed_tokenizer(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*Copy the tokenizer files"):
        load_tokenizer(saved)


def test_resolve_knows_paths_and_embedded_names(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(str(saved)) == saved
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(CheckpointError, match="not part of this installation"):
        resolve("embedded-softmax")
    (tmp_path / "embedded" / "softmax").mkdir(parents=True)
    assert resolve("embedded-softmax") == tmp_path / "embedded" / "softmax"
    with pytest.raises(CheckpointError, match=r"not a directory.*embedded-aug"):
        load_model("meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize(
    "load", [load_model, hub.load_causal_model, hub.load_any, hub.load_any_config]
)
def test_the_configuration_of_a_model_is_read_once(
    load: Callable[[Path], object], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    read = config_file.read_json
    monkeypatch.setattr(config_file, "read_json", lambda path: seen.append(path) or read(path))
    load(saved)
    assert seen.count(saved / "config.json") == 1


def test_missing_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json in"):
        load_config(saved)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_unreadable_config(text: str, saved: Path) -> None:
    (saved / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config.json.*copy the file again"):
        load_model(saved)


@pytest.mark.parametrize("decoder", [None, {"width": 3}, {**PLAIN.to_dict(), "norm": "no"}])
def test_own_format_with_a_broken_decoder_entry(decoder: object, saved: Path) -> None:
    edit_config(saved, model_type="linspec", decoder=decoder)
    with pytest.raises(CheckpointError, match="no sound 'decoder' entry"):
        load_model(saved)


def test_own_format_with_an_unknown_mixer(tmp_path: Path, saved: Path) -> None:
    config = PLAIN.with_mixers((MixerConfig(name="tomorrow"), MixerConfig()))
    edit_config(saved, model_type="linspec", decoder=config.to_dict())
    with pytest.raises(CheckpointError, match=r"unknown mixer 'tomorrow'; known: .*softmax"):
        load_model(saved)


def test_missing_weights(saved: Path) -> None:
    (saved / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"no weights in .*model.safetensors"):
        load_model(saved)


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was opened')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_not_opened(name: str, saved: Path) -> None:
    (saved / SINGLE).unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=rf"{name}.*save_pretrained"):
        load_model(saved)


def test_custom_code_is_ignored(saved: Path) -> None:
    (saved / "modeling.py").write_text("raise SystemExit('custom code was run')")
    code = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    edit_config(saved, auto_map=code)
    assert_same(load_model(saved), make(PLAIN))
    assert load_tokenizer(saved).encode("w3") == [3]
    edit_config(saved, model_type="custom")
    with pytest.raises(UnsupportedModel, match=r"'custom'.*llama"):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_weights(keep: int, saved: Path) -> None:
    data = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
        load_model(saved)


def test_weights_of_another_model(saved: Path) -> None:
    edit_config(saved, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks 9 of 29 tensors: model.layers.2"):
        load_model(saved)
    edit_config(saved, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"9 tensors that .* not have: model.layers.1"):
        load_model(saved)
    edit_config(saved, num_hidden_layers=2, intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"down_proj.weight .* \[16, 24\].* \[16, 32\]"):
        load_model(saved)
    edit_config(saved, intermediate_size=24, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks 1 of 21 tensors: lm_head.weight"):
        load_model(saved)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_model(make(PLAIN), None, tmp_path / "sharded", shard_bytes=2000)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"shard .*{shard.name} is missing"):
        load_model(sharded)


@pytest.mark.parametrize("names", [None, {"a": 1}, {"a": "../model/model.safetensors"}])
def test_broken_index(names: object, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"no weight_map|outside its directory"):
        load_model(sharded)


def test_config_errors_stay_out_of_loading(saved: Path) -> None:
    edit_config(saved, num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    assert not isinstance(error.value, ConfigError)
