"""A batch's state under transformers: rows that are copied, picked and reordered go on like fresh ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import MIXER_NAMES, mixer_config, random_tokens, randomise, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from linspec.checkpoints.hub import resolve
from linspec.integrations.transformers.config import LinspecConfig
from linspec.integrations.transformers.model import LinspecCache, LinspecForCausalLM
from linspec.state.contract import StateOptions
from linspec.state.grouped import GroupedSpec, GroupedState
from linspec.state.registry import STATES
from linspec.state.sequence_states import SequenceStates

# enough to close groups: sums that are never folded hide a wrong rule
TOKENS = 23


def make(name: str) -> LinspecForCausalLM:
    """Two layers of one mixer, the second with a span of two groups where there are groups."""
    mixer = mixer_config(name)
    wide = mixer if mixer.name == "global" else replace(mixer, span=2)
    shape = replace(tiny_config(mixer, wide), pad_id=0, eos_ids=(3,))
    model = LinspecForCausalLM(LinspecConfig(decoder=shape.to_dict()))
    randomise(model, seed=1)
    return model.double()


def go_on(model: LinspecForCausalLM, cache: LinspecCache, rows: torch.Tensor, seed: int) -> None:
    """New tokens for every row have the logits of a run from the start.

    The first of two steps closes groups; only the second reads what the fold has made of them.
    """
    more = torch.tensor([random_tokens(14, seed=seed + i) for i in range(len(rows))])
    parts = [model(part, past_key_values=cache).logits for part in more.split(9, dim=1)]
    logits = torch.cat(parts, dim=1)
    whole = model(torch.cat((rows, more), dim=1)).logits[:, rows.shape[1] :]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-9)


def read(model: LinspecForCausalLM, count: int = 3) -> tuple[LinspecCache, torch.Tensor]:
    ids = torch.tensor([random_tokens(TOKENS, seed=i) for i in range(count)])
    return model(ids, use_cache=True).past_key_values, ids


@pytest.mark.crossed(2)
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_repeated_rows_go_on_like_a_fresh_run(name: str) -> None:
    model = make(name)
    cache, ids = read(model)
    cache.batch_repeat_interleave(2)
    go_on(model, cache, ids.repeat_interleave(2, dim=0), seed=10)


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_selected_rows_go_on_like_a_fresh_run(name: str) -> None:
    model = make(name)
    cache, ids = read(model)
    picked = torch.tensor([2, 0])
    cache.batch_select_indices(picked)
    go_on(model, cache, ids[picked], seed=20)


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_reordered_rows_go_on_like_a_fresh_run(name: str) -> None:
    model = make(name)
    cache, ids = read(model)
    order = torch.tensor([2, 2, 0])
    cache.reorder_cache(order)
    go_on(model, cache, ids[order], seed=30)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_a_copied_cache_goes_on_like_a_fresh_run(name: str) -> None:
    model = make(name)
    cache, ids = read(model)
    again = copy.deepcopy(cache)
    for used in (again, cache):
        go_on(model, used, ids, seed=40)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_beams_with_a_cache_are_those_without(name: str) -> None:
    model = make(name)
    ids = torch.tensor([random_tokens(TOKENS, seed=50), random_tokens(TOKENS, seed=51)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, **settings)
    fresh = model.generate(ids, attention_mask=mask, **settings, use_cache=False)
    assert torch.equal(out, fresh)


def test_the_embedded_student_goes_on_from_repeated_rows() -> None:
    """Its span is several groups of 64: a short text folds nothing and shows nothing."""
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded-aug"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (1, 1300), generator=generator)
    more = torch.randint(5, model.config.vocab_size, (2, 140), generator=generator)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        parts = [model(part, past_key_values=cache).logits for part in more.split(70, dim=1)]
        whole = model(torch.cat((ids.repeat(2, 1), more), dim=1)).logits[:, ids.shape[1] :]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-3)


def test_copying_a_cache_copies_no_weights() -> None:
    model = make("aug:softmax")
    cache, _ = read(model)
    again = copy.deepcopy(cache)
    assert again.state is not None and cache.state is not None
    for new, old in zip(again.state.parts, cache.state.parts, strict=True):
        if isinstance(old, GroupedState):
            assert [fold.__self__ for fold in new.folds] == [fold.__self__ for fold in old.folds]
        assert new.keys.data_ptr() != old.keys.data_ptr()


@pytest.mark.parametrize("name", MIXER_NAMES)
@pytest.mark.parametrize("kv", STATES.names())
def test_an_empty_state_of_the_same_model_has_the_same_specs_and_rules(name: str, kv: str) -> None:
    model = tiny_model(name, name, name)
    if kv != "float" and not any(mixer.grows for mixer in model.config.mixers):
        pytest.skip("no cache to keep in another way")
    state = model.new_state(2, kv)
    other = state.empty(5)
    assert other.slots == 5
    assert [part.spec for part in other.parts] == [part.spec for part in state.parts]
    for new, old in zip(other.parts, state.parts, strict=True):
        assert type(new) is type(old) and new.entries is old.entries
        assert getattr(new, "folds", None) == getattr(old, "folds", None)
    assert [part.keys.dtype for part in other.parts] == [part.keys.dtype for part in state.parts]
    assert [part.dtype for part in other.parts] == [part.dtype for part in state.parts]


def test_a_state_without_fold_rules_cannot_be_built() -> None:
    spec = GroupedSpec(kv_heads=1, key_width=4, value_width=4, group=4, sum_width=4)
    with pytest.raises(TypeError, match="folds"):
        GroupedState(spec, slots=1, options=StateOptions())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="makers"):
        SequenceStates(slots=1, options=StateOptions())  # type: ignore[call-arg]
