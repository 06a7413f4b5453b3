"""Nodes that overwrite: what is refused, and which models compute them layer by layer."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_overwriting import VOCAB, by_layers, causal, denoiser, held, kept, over, same

from linspec.decoding.step import StepInput
from linspec.decoding.tree import shape_of
from linspec.errors import ConfigError, ContextOverflow, InputError, StateError
from linspec.kernels.step_plan import NewNodes
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.models.one_call import why_not


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"overwrite": [1, 9]}, StateError, "not all committed in slot 0, which has 9"),
        ({"overwrite": [-1, 2]}, StateError, "not all committed"),
        ({"overwrite": [2, 2]}, ConfigError, "a position of its own"),
        ({"overwrite": [1, 2, 3]}, ConfigError, "2 tokens to overwrite positions"),
        ({"overwrite": [1, 2.0]}, ConfigError, "whole numbers"),
        ({"overwrite": torch.tensor([1, 1])}, ConfigError, "whole numbers"),
        ({"tokens": [1, VOCAB]}, InputError, "not all in 0..60"),
        ({"logits_of": [2]}, ConfigError, "logits of tokens .* count from 0 to 1"),
        ({"logits_of": [-1]}, ConfigError, "logits of tokens"),
        ({"embeddings": torch.zeros(2, 63)}, InputError, "width 64"),
    ],
    ids=str,
)
def test_what_is_malformed_is_refused_before_it_is_read(
    library: ctypes.CDLL, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = denoiser()
    state = held(model, "float", 9)
    before = kept(state, 0)
    with pytest.raises(error, match=message):
        model.step([replace(over(0, [1, 2], 3), **changes)], state)
    assert same(kept(state, 0), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"overwrite": [1, 9]},
        {"overwrite": [-1, 0]},
        {"overwrite": [1, 1]},
        {"overwrite": [1]},
        {"positions": [0, -1]},
        {"positions": [0]},
        {"tokens": [1]},
        {"committed": [9, 1]},
    ],
    ids=str,
)
def test_the_kernel_itself_refuses_rows_that_a_slot_has_not(
    library: ctypes.CDLL, changes: dict[str, Any]
) -> None:
    model = denoiser()
    state, native = held(model, "float", 9), model.native
    assert native is not None
    native.place(state)
    nodes = {"tokens": [1, 2], "positions": [1, 2], "committed": [9], "overwrite": [1, 2]}
    with pytest.raises(StateError, match=r"cannot overwrite rows .* of slot 0, which has \d"):
        native.kernel.run_over([NewNodes(slot=0, shape=shape_of(()), **nodes | changes)], [0])


def test_a_step_of_several_kinds_is_checked_before_any_of_it_runs(library: ctypes.CDLL) -> None:
    model = causal(max_positions=100)
    state = model.new_state(2)
    for slot in (0, 1):
        model.step([StepInput(slot, [1, 2, 3])], state)
        state.commit(slot, range(3))
    for wrong, error in (
        (StepInput(1, [1] * 98), ContextOverflow),
        (over(1, [3], 0), StateError),
        (over(0, [2], 0), ConfigError),
    ):
        with pytest.raises(error):
            model.step([StepInput(0, [4, 5]), wrong], state)
        assert not len(state.staged(0)) and not len(state.staged(1))


# ---- which models


@pytest.mark.parametrize(
    "changes",
    [
        {"mixers": (MixerConfig(taps=3),) * 3},
        {"positions": "relative", "relative": RelativeConfig()},
    ],
    ids=["taps", "relative"],
)
def test_what_weighs_by_distance_overwrites_layer_by_layer(
    library: ctypes.CDLL, changes: dict[str, Any]
) -> None:
    reader = causal(**changes)
    assert reader.native is not None
    state = reader.new_state()
    reader.step([StepInput(0, list(range(20)))], state)
    state.commit(0, range(20))
    other = reader.new_state()
    other.restore(0, state.snapshot(0))
    inputs = [over(0, [3, 19, 7], 1)]
    assert torch.equal(reader.step(inputs, state).logits, by_layers(reader, inputs, other).logits)
    model = denoiser(**changes)
    # where tokens see both ways a convolution is centred
    assert (model.native is not None) == (reader.config.mixers[0].taps > 0)
    assert model.native or "see no later tokens" in str(why_not(model))
