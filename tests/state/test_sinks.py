"""Sinks keep the bytes of their entries when they leave, whatever the format."""

from __future__ import annotations

import pytest
import torch

from linspec.decoding.tree import chain_shape
from linspec.state.contract import StateOptions
from linspec.state.registry import entry_format
from linspec.state.sinks import SinkSpec, SinkState

SINKS, GROUP, WIDTH = 3, 4, 32


@torch.inference_mode()
def filled(kind: str, tokens: int, slots: int = 2) -> tuple[SinkState, torch.Tensor, torch.Tensor]:
    """A state whose slot 1 has committed random tokens one by one, and their keys and values."""
    spec = SinkSpec(
        kv_heads=2, key_width=WIDTH, value_width=WIDTH, group=GROUP, span=2,
        sum_width=SINKS, sum_columns=2 * WIDTH + 1,
    )  # fmt: skip
    options = StateOptions(kv_cache=kind)
    state = SinkState(spec, 2, slots, options, entry_format(options))
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(2, tokens, WIDTH, generator=generator) for _ in range(2))
    for token in range(tokens):
        for layer in range(2):
            one = slice(token, token + 1)
            state.stage(layer, 1, [1], keys[None, :, one] + layer, values[None, :, one] - layer)
        state.record(1, chain_shape(1))
        state.commit(1, (0,))
    return state, keys, values


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16", "int8", "int4"])
def test_sinks_that_left_are_the_first_entries(kind: str) -> None:
    state, keys, values = filled(kind, 23)
    coded = entry_format(StateOptions(kv_cache=kind))
    for layer in range(2):
        sums = state.read_sums(layer, slice(0, 2))
        assert sums is not None
        # nothing of the slot that has committed nothing
        assert not sums[0].any()
        for rows, at in ((keys + layer, slice(WIDTH)), (values - layer, slice(WIDTH, 2 * WIDTH))):
            kept = coded.decode(coded.encode(rows[:, :SINKS]), WIDTH, torch.float32)
            assert torch.equal(sums[1, :, :, at], kept.float())
        assert (sums[1, :, :, -1] == 1).all()


@pytest.mark.parametrize("kind", ["float", "float16", "int8", "int4"])
def test_a_copy_and_a_reset(kind: str) -> None:
    state, *_ = filled(kind, 23)
    before = state.read_sums(0, slice(1, 2))
    assert before is not None
    state.fork(1, 0)
    after = state.read_sums(0, slice(0, 1))
    assert after is not None
    assert torch.equal(before, after)
    state.reset(1)
    gone = state.read_sums(0, slice(1, 2))
    assert gone is not None
    assert not gone.any()


def test_sinks_stay_rows_while_their_group_is_near() -> None:
    state, *_ = filled("int8", 2 * GROUP - 1)
    sums = state.read_sums(0, slice(1, 2))
    assert sums is not None
    assert not sums[..., -1].any()
