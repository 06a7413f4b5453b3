"""What a checkpoint says beside its plain weights survives loading and saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from linspec.checkpoints.hub import load_model, save_model
from linspec.checkpoints.weights import INDEX, SINGLE
from linspec.errors import CheckpointError
from linspec.mixers.config import MixerConfig
from linspec.train.student import with_mixers


def llama(folder: Path, dtype: torch.dtype = torch.float32, **switches: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **switches)).to(dtype)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 3], bos_token_id=1
    )
    model.save_pretrained(folder)
    return folder


def with_head(folder: Path, head: torch.Tensor) -> None:
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"lm_head.weight": head}, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("resaved", [False, True])
def test_a_head_that_is_not_the_embedding_is_kept_though_config_says_tied(
    tmp_path: Path, resaved: bool
) -> None:
    folder = llama(tmp_path / "m", tie_word_embeddings=True)
    head = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    with_head(folder, head)
    model = load_model(folder)
    if resaved:
        model = load_model(save_model(model, None, tmp_path / "again"))
    assert not model.config.tied_embeddings
    assert torch.equal(model.head.weight, head)
    ids = torch.tensor([[1, 5, 7]])
    theirs = LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", tie_word_embeddings=True)
    with_head(folder, load_file(folder / SINGLE)["model.embed_tokens.weight"].clone())
    model = load_model(folder)
    assert model.config.tied_embeddings
    assert model.head.weight is model.embed.weight


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / SINGLE).values()}


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_saving_keeps_bf16_and_sampling_defaults(tmp_path: Path, mixer: str) -> None:
    source = llama(tmp_path / "m", torch.bfloat16)
    model = load_model(source)
    if mixer == "aug":
        model = with_mixers(model, (MixerConfig(name="aug", group=8, taps=2),) * 2)
    out = save_model(model, None, tmp_path / "out")
    assert dtypes(out) == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / SINGLE).stat().st_size < 1.2 * (source / SINGLE).stat().st_size + 4096
    said = json.loads((out / "generation_config.json").read_text())
    assert (said["do_sample"], said["temperature"], said["top_p"]) == (True, 0.6, 0.9)
    assert (said["eos_token_id"], said["bos_token_id"]) == ([2, 3], 1)
    twice = save_model(load_model(out), None, tmp_path / "twice")
    assert json.loads((twice / "generation_config.json").read_text()) == said


def test_saving_in_another_dtype_stays_possible(tmp_path: Path) -> None:
    model = load_model(llama(tmp_path / "m", torch.bfloat16))
    assert dtypes(save_model(model, None, tmp_path / "a", torch.float32)) == {torch.float32}
    # converted after loading: that was meant
    assert dtypes(save_model(model.half(), None, tmp_path / "b")) == {torch.float16}
    plain = load_model(llama(tmp_path / "f"))
    assert dtypes(save_model(plain, None, tmp_path / "c")) == {torch.float32}


def without_index(tmp_path: Path) -> Path:
    model = load_model(llama(tmp_path / "m"))
    folder = save_model(model, None, tmp_path / "shards", shard_bytes=2000)
    (folder / INDEX).unlink()
    return folder


def test_shards_without_an_index_are_read_when_all_are_there(tmp_path: Path) -> None:
    folder = without_index(tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = load_model(tmp_path / "m").state_dict()
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_missing_shards_are_named_without_an_index(tmp_path: Path) -> None:
    folder = without_index(tmp_path)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"missing: {gone.stem} \(.safetensors\)"):
        load_model(folder)


def test_shards_of_two_sets_are_refused_without_an_index(tmp_path: Path) -> None:
    folder = without_index(tmp_path)
    (folder / "model-00001-of-00099.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="shards of several sets"):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = without_index(tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(CheckpointError, match="in another shard as well"):
        load_model(folder)
