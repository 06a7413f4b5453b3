"""linspec checkpoints under transformers' Auto classes: same logits, same tokens, refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, mixer_config, random_tokens, randomise, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from linspec.checkpoints.hub import load_model, save_model
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import MAX_STAGED
from linspec.engine.engine import Engine
from linspec.errors import CheckpointError, ConfigError, ContextOverflow, InputError, StateError
from linspec.integrations.transformers.config import LinspecConfig
from linspec.integrations.transformers.model import LinspecCache, LinspecForCausalLM
from linspec.models.decoder import Decoder
from linspec.verifiers.lossless import LosslessVerifier

PAD, EOS = 0, 3
MODELS = {"aug": ("aug", "aug"), "mixed": ("softmax", "aug", "window"), "relu": ("relu", "relu")}

# one token, an odd few, and more than can be staged in place; transformers takes a PAD for padding
PROMPTS = [[t for t in random_tokens(99, seed=n) if t != PAD][:n] for n in (1, 7, MAX_STAGED + 7)]
Saved = Callable[..., tuple[Decoder, Any]]


def make(*mixers: str, **switches: Any) -> Decoder:
    config = replace(
        tiny_config(*(mixer_config(name) for name in mixers)),
        **{"eos_ids": (EOS,), "pad_id": PAD, **switches},
    )
    model = randomise(Decoder(config), seed=1).double()
    if config.tied_embeddings:
        assert model.head.weight is model.embed.weight
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Builds a decoder, saves it, and loads it with the Auto class."""

    def build(*mixers: str, **switches: Any) -> tuple[Decoder, Any]:
        decoder = make(*mixers, **switches)
        folder = save_model(decoder, None, tmp_path / "model")
        return decoder, AutoModelForCausalLM.from_pretrained(folder)

    return build


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(p)) + [*p] for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def new_tokens(out: torch.Tensor, width: int) -> list[list[int]]:
    """What generate() added to each row, up to the end of the sequence."""
    rows = [row[width:].tolist() for row in out]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def engine_tokens(
    decoder: Decoder, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    engine = Engine(decoder, verifier=LosslessVerifier(), drafter=None)
    rows = {engine.add(Request(tuple(p), SamplingParams(max_tokens=count))): [] for p in prompts}
    while engine.busy:
        for emitted in engine.step():
            rows[emitted.sequence.request] += emitted.tokens
    return list(rows.values())


# ---- agreement


@pytest.mark.parametrize("mixers", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_auto_model_has_the_logits_of_the_decoder(
    saved: Saved, mixers: tuple[str, ...], tied: bool
) -> None:
    decoder, model = saved(*mixers, tied_embeddings=tied)
    assert type(model) is LinspecForCausalLM
    assert type(model.config) is LinspecConfig
    assert (model.head.weight is model.embed.weight) is tied
    ids = torch.tensor([random_tokens(63), random_tokens(63, seed=1)])
    torch.testing.assert_close(model(ids).logits, decoder(ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, decoder(ids)[:, -2:])
    picked = torch.tensor([5, 1])
    torch.testing.assert_close(model(ids, logits_to_keep=picked).logits, decoder(ids)[:, picked])
    assert model(ids, return_dict=False)[0].shape == (2, 63, VOCAB)


@pytest.mark.parametrize("mixers", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("pieces", [(63,), (1, 62), (5, 8, 50), (60, 1, 1, 1)])
def test_cached_pieces_have_the_logits_of_the_full_form(
    saved: Saved, mixers: tuple[str, ...], pieces: tuple[int, ...]
) -> None:
    _, model = saved(*mixers)
    batch = left_padded([random_tokens(63), random_tokens(40, seed=1), random_tokens(2, seed=2)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = model(ids, mask).logits
    cache, parts, done = LinspecCache(), [], 0
    for count in pieces:
        # the mask of all columns so far and that of the new ones mean the same
        first = 0 if done % 2 else done
        part = slice(done, done + count)
        out = model(ids[:, part], mask[:, first : part.stop], past_key_values=cache)
        assert out.past_key_values is cache
        parts.append(out.logits)
        done += count
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], rtol=0, atol=1e-10)
    assert cache.get_seq_length() == 63
    assert [cache.state.length(slot) for slot in range(3)] == [63, 40, 2]


@pytest.mark.parametrize("mixers", MODELS.values(), ids=MODELS)
def test_greedy_generate_equals_the_engine(saved: Saved, mixers: tuple[str, ...]) -> None:
    decoder, model = saved(*mixers)
    expected = engine_tokens(decoder, PROMPTS, 20)
    assert any(len(tokens) == 20 for tokens in expected)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=20)
        assert new_tokens(out, len(prompt)) == [tokens]
    batch = left_padded(PROMPTS)
    width = batch["input_ids"].shape[1]
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 9}):
        out = model.generate(**batch, **settings, max_new_tokens=20, do_sample=False)
        assert new_tokens(out, width) == expected, settings


@pytest.mark.parametrize("mixers", MODELS.values(), ids=MODELS)
def test_beam_search_with_a_cache_equals_without(saved: Saved, mixers: tuple[str, ...]) -> None:
    _, model = saved(*mixers)
    batch = left_padded([random_tokens(3), random_tokens(9, seed=4)])
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 11}
    out = model.generate(**batch, **settings)
    assert len(out) == 4
    assert torch.equal(out, model.generate(**batch, **settings, use_cache=False))
    assert not torch.equal(out[::2], model.generate(**batch, max_new_tokens=11)[:, : out.shape[1]])


def test_sampling_repeats_with_its_seed(saved: Saved) -> None:
    _, model = saved("aug")
    batch = left_padded(PROMPTS[:2])
    outs = []
    for cached in (True, True, False):
        torch.manual_seed(5)
        outs.append(
            model.generate(
                **batch,
                do_sample=True,
                top_k=0,
                num_return_sequences=3,
                max_new_tokens=8,
                use_cache=cached,
            )
        )
    assert len(outs[0]) == 6
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0][0], outs[0][1])


def test_generation_goes_on_from_a_copied_cache(saved: Saved) -> None:
    _, model = saved("aug", "softmax")
    prefix, rest = random_tokens(9), random_tokens(4, seed=1)
    ids = torch.tensor([[*prefix, *rest]])
    expected = model.generate(ids, max_new_tokens=9)
    cache = LinspecCache()
    model(ids[:, : len(prefix)], past_key_values=cache)
    for _ in range(2):
        again = copy.deepcopy(cache)
        assert torch.equal(model.generate(ids, past_key_values=again, max_new_tokens=9), expected)
    assert cache.get_seq_length() == len(prefix)
    cache.batch_repeat_interleave(2)
    twice = model.generate(
        ids, past_key_values=cache, num_return_sequences=2, num_beams=2, max_new_tokens=9
    )
    assert torch.equal(
        twice, model.generate(ids, num_return_sequences=2, num_beams=2, max_new_tokens=9)
    )


def test_cache_rows_can_be_picked(saved: Saved) -> None:
    _, model = saved("aug", "softmax")
    ids = torch.tensor([random_tokens(9, seed=i) for i in range(3)])
    cache = LinspecCache()
    assert (cache.batch_size, len(cache), cache.is_initialized) == (-1, 0, False)
    model(ids, past_key_values=cache)
    assert (cache.batch_size, len(cache), cache.is_initialized) == (3, 2, True)
    assert cache.has_previous_state()
    assert cache.get_mask_sizes(2) == (11, 0)
    assert cache.get_max_length() == 4096
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.batch_select_indices(torch.tensor([2, 0]))
    token = torch.tensor([[5], [5]])
    whole = torch.cat((ids[[0, 2]], token), dim=1)
    torch.testing.assert_close(
        model(token, past_key_values=cache).logits, model(whole).logits[:, -1:], rtol=0, atol=1e-10
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    assert repr(cache) == "LinspecCache(rows=-1, columns=0)"


# ---- hidden states


def layer_by_layer(decoder: Decoder, ids: torch.Tensor) -> list[torch.Tensor]:
    x, ropes = decoder.enter(ids, torch.arange(ids.shape[1]))
    states = [x]
    for block, rope in zip(decoder.layers, ropes, strict=True):
        states.append(block(states[-1], rope))
    return [*states[:-1], decoder.leave(states[-1])]


@pytest.mark.parametrize("mixers", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cached", [False, True])
def test_hidden_states_are_given(saved: Saved, mixers: tuple[str, ...], cached: bool) -> None:
    decoder, model = saved(*mixers)
    batch = left_padded([random_tokens(63), random_tokens(40, seed=1)])
    out = model(**batch, use_cache=cached, output_hidden_states=True)
    assert len(out.hidden_states) == len(mixers) + 1
    for row, mask, at in zip(batch["input_ids"], batch["attention_mask"], range(2), strict=True):
        for state, expected in zip(
            out.hidden_states, layer_by_layer(decoder, row[None, mask.bool()]), strict=True
        ):
            torch.testing.assert_close(state[at, mask.bool()], expected[0], rtol=0, atol=1e-10)
    again = model(**batch, use_cache=cached)
    assert again.hidden_states is None
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], again.logits[real], rtol=0, atol=1e-10)
    last = model(**batch, use_cache=cached, output_hidden_states=True, logits_to_keep=1)
    assert last.logits.shape[1] == 1
    assert last.hidden_states[-1].shape[1] == 63


def test_hidden_states_and_tuples_asked_for_by_the_configuration_are_given(saved: Saved) -> None:
    _, model = saved("aug", "softmax")
    ids = torch.tensor([random_tokens(9)])
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert len(model(ids, use_cache=True).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    logits, states = model(ids)
    assert len(states) == 3
    assert logits.shape == (1, 9, VOCAB)
    assert model(ids, return_dict=True).logits.shape == (1, 9, VOCAB)


def test_generate_returns_hidden_states(saved: Saved) -> None:
    decoder, model = saved("aug", "softmax")
    out = model.generate(
        torch.tensor([random_tokens(9)]),
        max_new_tokens=4,
        min_new_tokens=4,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    found = [torch.cat([step[layer] for step in out.hidden_states], dim=1) for layer in range(3)]
    for state, expected in zip(found, layer_by_layer(decoder, out.sequences[:, :-1]), strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-10)


def test_a_prepared_decoder_has_no_hidden_states_to_give(saved: Saved) -> None:
    _, model = saved("aug", "softmax")
    model = model.float()
    model.decoder.to_inference()
    if model.decoder.native is None:
        pytest.skip("no C library")
    with pytest.raises(ConfigError, match="was prepared"):
        model(torch.tensor([random_tokens(9)]), use_cache=True, output_hidden_states=True)


# ---- training


def test_loss_is_that_of_the_rows_without_padding(saved: Saved) -> None:
    _, model = saved("aug", "relu")
    rows = [random_tokens(5), random_tokens(9, seed=1)]
    singles = [model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows]
    mean = (singles[0] * 4 + singles[1] * 8) / 12
    batch = left_padded(rows)
    loss = model(**batch, labels=batch["input_ids"]).loss
    # transformers takes the loss in float32
    torch.testing.assert_close(loss, mean, rtol=1e-5, atol=0)
    flipped = {
        name: tensor.flip(1) for name, tensor in left_padded([r[::-1] for r in rows]).items()
    }
    loss = model(**flipped, labels=flipped["input_ids"], use_cache=False).loss
    torch.testing.assert_close(loss, mean, rtol=1e-5, atol=0)
    counted = model(**batch, labels=batch["input_ids"], num_items_in_batch=24).loss
    torch.testing.assert_close(counted, mean / 2, rtol=1e-5, atol=0)


def test_every_weight_gets_a_gradient(saved: Saved) -> None:
    _, model = saved("softmax", "aug")
    ids = torch.tensor([random_tokens(9)])
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


# peft asks transformers for a name that is going away
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora_adapters_train_and_generate(saved: Saved) -> None:
    peft = pytest.importorskip("peft")
    _, model = saved("aug", "softmax")
    ids = torch.tensor([random_tokens(9)])
    before = model(ids).logits.detach()
    tuned = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q", "v"], init_lora_weights=False
        ),
    )
    after = tuned(input_ids=ids, labels=ids)
    after.loss.backward()
    assert not torch.allclose(after.logits, before)
    trained = [name for name, p in tuned.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)
    settings = {"input_ids": ids, "max_new_tokens": 6}
    assert torch.equal(tuned.generate(**settings), tuned.generate(**settings, use_cache=False))


def test_resized_embeddings_are_saved_and_loaded(saved: Saved, tmp_path: Path) -> None:
    _, model = saved("aug")
    model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    ids = torch.tensor([[VOCAB + 1, 2]])
    logits = model(ids).logits
    assert logits.shape == (1, 2, VOCAB + 2)
    assert model.head.weight is model.embed.weight
    model.save_pretrained(tmp_path / "wide")
    torch.testing.assert_close(load_model(tmp_path / "wide", dtype=torch.float64)(ids), logits)


# ---- files


@pytest.mark.parametrize("tied", [True, False])
def test_save_pretrained_writes_the_format_of_linspec(
    saved: Saved, tmp_path: Path, tied: bool
) -> None:
    decoder, model = saved("aug", "softmax", tied_embeddings=tied)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["model_type"] == "linspec"
    first, second = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "again")
    )
    assert first.keys() == second.keys()
    loaded = load_model(tmp_path / "again", dtype=torch.float64)
    assert loaded.config == decoder.config
    for ours, theirs in zip(decoder.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_are_loaded_in_the_asked_dtype(saved: Saved, tmp_path: Path) -> None:
    decoder, model = saved("aug")
    assert model.dtype == torch.float64
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.generate(torch.tensor([[1, 2]]), max_new_tokens=5).shape[1] <= 7
    ids = torch.tensor([random_tokens(9)])
    expected = decoder.to(torch.bfloat16)(ids)
    torch.testing.assert_close(half(ids).logits, expected)


def test_fresh_model_from_a_config() -> None:
    decoder = tiny_config(mixer_config("aug"))
    config = AutoConfig.for_model("linspec", decoder=decoder.to_dict())
    model = AutoModelForCausalLM.from_config(config)
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    assert (config.hidden_size, config.num_hidden_layers) == (decoder.width, decoder.layers)
    assert config.get_text_config(decoder=True) is config
    with pytest.raises(ConfigError, match=r"needs decoder=\.\.\."):
        LinspecForCausalLM(LinspecConfig())


def test_several_end_tokens_end_generation(saved: Saved) -> None:
    _, model = saved("aug", eos_ids=tuple(range(VOCAB)))
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=9).shape == (1, 3)


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_wrong_tensors_are_refused(tmp_path: Path, kind: str) -> None:
    folder = save_model(make("aug"), None, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    if kind == "missing":
        del tensors["blocks.0.mixer.taps"]
    else:
        tensors["blocks.0.mixer.more"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{kind} tensors: blocks.0.mixer"):
        AutoModelForCausalLM.from_pretrained(folder)


# ---- refusals


@pytest.mark.parametrize("mixer", ["aug", "softmax"])
def test_assisted_generation_is_refused(saved: Saved, mixer: str) -> None:
    _, model = saved("aug", mixer)
    ids = torch.tensor([random_tokens(9)])
    with pytest.raises(StateError, match="cannot be cropped"):
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=5)
    with pytest.raises(StateError, match="cannot be cropped"):
        model.generate(ids, assistant_model=copy.deepcopy(model), max_new_tokens=5)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.is_croppable is False
    for refused in (lambda: cache.crop(1), cache.activate_past_recording):
        with pytest.raises(StateError, match="cannot be cropped"):
            refused()
    with pytest.raises(StateError, match="another model's layers"):
        cache.update(ids, ids, 0)
    with pytest.raises(StateError, match="cannot be paged"):
        model.init_continuous_batching()


def test_foreign_caches_are_refused(saved: Saved) -> None:
    _, model = saved("aug")
    ids = torch.tensor([random_tokens(4)])
    with pytest.raises(StateError, match="cannot use a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="'static' is not for linspec"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(StateError, match="1 rows, input_ids has 2"):
        model(ids.repeat(2, 1), past_key_values=cache)
    other = LinspecForCausalLM(LinspecConfig(decoder=tiny_config(mixer_config("relu")).to_dict()))
    with pytest.raises(StateError, match="of another model"):
        other(ids, past_key_values=cache)


def test_prompts_that_cannot_be_continued_are_refused(saved: Saved) -> None:
    _, model = saved("aug")
    ids = torch.tensor([[1, 2, 0], [4, 5, 6]])
    right, nothing = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    with pytest.raises(InputError, match="padding_side='left'"):
        model.generate(ids, attention_mask=right, max_new_tokens=2)
    with pytest.raises(InputError, match="all padding"):
        model.generate(ids, attention_mask=nothing, max_new_tokens=2)


def test_what_would_be_ignored_is_refused(saved: Saved) -> None:
    _, model = saved("aug")
    ids = torch.tensor([random_tokens(4)])
    with pytest.raises(ConfigError, match="no attention weights"):
        model(ids, output_attentions=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "_output_attentions", True)
        with pytest.raises(ConfigError, match="no attention weights"):
            model(ids)
    with pytest.raises(ConfigError, match="not inputs_embeds"):
        model(None, inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ConfigError, match="differentiable form"):
        model(ids, labels=ids, use_cache=True)
    with pytest.raises(InputError, match=r"must be \[rows, tokens\]"):
        model(ids[0])
    with pytest.raises(InputError, match="one column for each"):
        model(ids, torch.ones(1, 3))
    with pytest.raises(InputError, match="between its tokens"):
        model(ids, torch.tensor([[1, 0, 1, 1]]))


def test_packed_rows_are_refused(saved: Saved) -> None:
    _, model = saved("aug")
    ids = torch.tensor([random_tokens(4)])
    cache = model(ids, position_ids=torch.tensor([[0, 1, 2, 3]]), use_cache=True).past_key_values
    model(ids, position_ids=torch.tensor([[4, 5, 6, 7]]), past_key_values=cache)
    with pytest.raises(InputError, match="packed"):
        model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(InputError, match="packed"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3]]), past_key_values=cache)


def test_a_refused_step_leaves_the_cache_as_it_was(saved: Saved) -> None:
    _, model = saved("softmax", "aug", max_positions=8)
    ids = torch.tensor([random_tokens(6)])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ContextOverflow):
        model(ids, past_key_values=cache)
    again = model(ids[:, :2], past_key_values=cache).logits
    whole = model(torch.cat((ids, ids[:, :2]), dim=1)).logits
    torch.testing.assert_close(again, whole[:, -2:], rtol=0, atol=1e-10)


def test_interrupted_step_stages_nothing(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = saved("aug", "relu")
    ids = torch.tensor([random_tokens(MAX_STAGED + 9)])
    cache = model(ids, use_cache=True).past_key_values
    with monkeypatch.context() as patch:

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(model.decoder.layers[1], "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
    again = model(ids, past_key_values=cache).logits
    whole = model(torch.cat((ids, ids), dim=1)).logits[:, ids.shape[1] :]
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-10)
