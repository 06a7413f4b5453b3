"""What a whole model's state allows and refuses: skipped layers, ephemeral nodes, overwriting, caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from guests import paged_state
from helpers import (
    TAPS,
    assert_close,
    assert_same_bytes,
    feed,
    mixer_config,
    prefilled,
    random_tokens,
    randomise,
    remembered,
    tiny_config,
    tiny_model,
)

from linspec.decoding.step import StepInput
from linspec.errors import ConfigError, StateError
from linspec.models.decoder import Decoder
from linspec.state.registry import STATES

TEXT = random_tokens(9)


# ---- skipped layers


def test_a_draft_through_some_layers_leaves_no_trace() -> None:
    model = tiny_model("aug", "softmax", "aug", "softmax")
    state, clean = prefilled(model, TEXT), prefilled(model, TEXT)
    before = state.snapshot(0)
    for layers in ([0], [0, 3], [1, 2, 3]):
        model.step([StepInput(0, [1, 2, 3])], state, layers=layers)
        with pytest.raises(StateError, match="drop the nodes, and commit a step through all"):
            state.commit(0, [0])
        model.step([StepInput(0, [4], [2])], state, layers=layers)
        state.drop(0)
        assert_same_bytes(state.snapshot(0), before)
    expected = model.step([StepInput(0, [5, 6])], clean).logits
    assert torch.equal(model.step([StepInput(0, [5, 6])], state).logits, expected)


def test_a_step_without_some_layers_is_the_model_without_them() -> None:
    model, short = tiny_model("aug", "softmax", "relu"), tiny_model("aug", "relu")
    short.load_state_dict(model.state_dict(), strict=False)
    short.blocks[1].load_state_dict(model.blocks[2].state_dict())
    out = model.step([StepInput(0, TEXT)], model.new_state(), layers=[0, 2]).logits
    assert_close(out, short.step([StepInput(0, TEXT)], short.new_state()).logits)


def test_layers_that_were_skipped_together_keep_their_own_length() -> None:
    model, short = tiny_model("aug", "softmax", "aug"), tiny_model("aug", "aug")
    short.load_state_dict(model.state_dict(), strict=False)
    short.blocks[1].load_state_dict(model.blocks[2].state_dict())
    state, alone = model.new_state(), short.new_state()
    model.step([StepInput(0, TEXT)], state, layers=[0, 2])
    state.commit(0, range(len(TEXT)))
    feed(short, alone, TEXT)
    assert [part.lengths[0] for part in state.parts] == [len(TEXT), 0]
    assert state.length(0) == len(TEXT)
    out = model.step([StepInput(0, [3])], state, layers=[0, 2]).logits
    assert_close(out, short.step([StepInput(0, [3])], alone).logits)


def test_nodes_staged_in_other_layers_are_refused_before_any_work() -> None:
    model = tiny_model("aug", "softmax")
    state = prefilled(model, TEXT)
    model.step([StepInput(0, [1])], state)
    with pytest.raises(StateError, match="slot 0 has staged nodes in other layers"):
        model.step([StepInput(0, [2], [0])], state, layers=[0])
    assert len(state.staged(0)) == 1
    state.commit(0, [0])
    assert_close(remembered(model, state), remembered(model, prefilled(model, [*TEXT, 1])))


# ---- ephemeral nodes


def test_ephemeral_nodes_are_seen_by_others_and_never_committed() -> None:
    model = tiny_model("aug", "softmax")
    state = prefilled(model, TEXT)
    plain, marks = StepInput(0, [1, 2, 3], [-1, 0, 1]), [False, True, False]
    expected = model.step([plain], prefilled(model, TEXT)).logits
    assert torch.equal(model.step([replace(plain, ephemeral=marks)], state).logits, expected)
    model.step([StepInput(0, [4], [2], ephemeral=[True])], state)
    before = state.snapshot(0)
    with pytest.raises(StateError, match=r"nodes \[1, 3\] of slot 0 are ephemeral"):
        state.commit(0, [0, 1, 2, 3])
    assert_same_bytes(state.snapshot(0), before)
    state.commit(0, [0])
    assert_close(remembered(model, state), remembered(model, prefilled(model, [*TEXT, 1])))
    with pytest.raises(ConfigError, match="2 tokens and 1 marks of ephemeral nodes"):
        model.step([StepInput(0, [4, 5], ephemeral=[True])], state)
    # the next nodes of the slot are their own
    model.step([StepInput(0, [4, 5])], state)
    state.commit(0, [0, 1])


# ---- overwriting


def test_a_model_that_sums_refuses_to_overwrite_before_any_work() -> None:
    for mixer in ("aug", "window"):
        state = prefilled(tiny_model("softmax", mixer), TEXT)
        before = state.snapshot(0)
        with pytest.raises(StateError, match="cannot overwrite committed positions"):
            state.check_overwrite(0, [1])
        assert_same_bytes(state.snapshot(0), before)
    state = prefilled(tiny_model("softmax"), TEXT)
    state.check_overwrite(0, [0, len(TEXT) - 1])
    with pytest.raises(StateError, match="not all committed"):
        state.check_overwrite(0, [len(TEXT)])


@pytest.mark.parametrize("kind", ["float", "guest-paged:block=3"])
@pytest.mark.parametrize("layers", [("softmax", "softmax"), (mixer_config("softmax", TAPS),) * 2])
def test_overwriting_the_end_of_a_text_is_having_read_another(
    layers: tuple[object, ...], kind: str
) -> None:
    model, other = tiny_model(*layers), random_tokens(4, seed=5)
    state = model.new_state(2, kind)
    for slot in (0, 1):
        feed(model, state, TEXT, slot)
    positions = range(len(TEXT) - len(other), len(TEXT))
    inputs = [StepInput(0, other, overwrite=positions), StepInput(1, [1, 2], [-1, -1])]
    found = model.step(inputs, state)
    text = [*TEXT[: -len(other)], *other]
    with torch.no_grad():
        assert_close(found.logits[: len(other)], model(torch.tensor([text]))[0, -len(other) :])
    assert not state.staged(0) and len(state.staged(1)) == 2
    assert_close(remembered(model, state), remembered(model, prefilled(model, text)))
    step = [StepInput(0, [3, 4])]
    assert_close(model.step(step, state).logits, model.step(step, prefilled(model, text)).logits)


def test_overwritten_tokens_may_see_later_positions() -> None:
    """One layer: what a token sees is a plain softmax over all entries."""
    model = randomise(Decoder(tiny_config(mixer_config("softmax"))), seed=0).double()
    state = prefilled(model, TEXT)
    (causal, free) = (
        model.step([StepInput(0, TEXT, overwrite=range(len(TEXT)), causal=c)], state).logits
        for c in (True, False)
    )
    assert len(model.layers) == 1
    assert_close(causal[-1], free[-1])
    assert (causal - free)[:-1].abs().amax(1).min() > 1e-3
    with torch.no_grad():
        assert_close(causal, model(torch.tensor([TEXT]))[0])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"overwrite": [1]}, ConfigError, "2 tokens to overwrite positions"),
        ({"overwrite": [1, 1]}, ConfigError, "a position of its own"),
        ({"overwrite": [1, 9]}, StateError, "not all committed"),
        ({"overwrite": [1, 2], "parents": [-1, 0]}, StateError, "stage nodes at once"),
    ],
)
def test_what_cannot_be_overwritten_changes_nothing(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    state = prefilled(tiny_model("softmax"), TEXT)
    before = state.snapshot(0)
    with pytest.raises(error, match=message):
        tiny_model("softmax").step([StepInput(0, [1, 2], **given)], state)
    assert_same_bytes(state.snapshot(0), before)


# ---- branches


# of each branch: what it overwrites, not all of it what the one before it does
BRANCHES = [range(9), [2, 3, 7], [3, 8], [0, 1, 2, 3, 4]]


def branch_inputs(slot: int = 0) -> list[StepInput]:
    return [
        StepInput(slot, random_tokens(len(at), seed=n), overwrite=at, causal=False, branch=n)
        for n, at in enumerate(BRANCHES)
    ]


@pytest.mark.parametrize(
    ("kind", "dtype", "atol"),
    [
        ("float", torch.float64, 1e-10),
        ("float", torch.float32, 1e-5),
        ("int8", torch.float64, 1e-10),
        ("int4", torch.float64, 1e-10),
    ],
)
@pytest.mark.parametrize("layers", [("softmax", "softmax"), (mixer_config("softmax", TAPS),) * 2])
def test_branches_are_steps_one_after_the_other(
    layers: tuple[Any, ...], kind: str, dtype: torch.dtype, atol: float
) -> None:
    model, other = tiny_model(*layers, dtype=dtype), StepInput(1, [1, 2], [-1, -1])
    for kept in range(len(BRANCHES)):
        state, alone = model.new_state(2, kind), model.new_state(2, kind)
        for slot in (0, 1):
            feed(model, state, TEXT, slot)
            feed(model, alone, TEXT, slot)
        found = model.step([*branch_inputs(), other], state)
        assert state.branches(0) == 3 and state.branches(1) == 0
        held = []
        for each, place in zip(branch_inputs(), found.slices, strict=False):
            expected = model.step([replace(each, branch=0)], alone).logits
            assert_close(found.logits[place], expected, atol)
            held.append(alone.snapshot(0))
        assert_close(found.logits[found.slices[-1]], model.step([other], alone).logits, atol)
        # what branches overwrite is seen by none but later ones, until one is kept
        assert_kept(state.snapshot(0), held[0], atol)
        state.keep_branch(0, kept)
        assert_kept(state.snapshot(0), held[kept], atol)
        assert state.branches(0) == 0 and len(state.staged(1)) == 2


def assert_kept(found: list[Any], expected: list[Any], atol: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_close((a.keys, a.values), (b.keys, b.values), atol)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (branch_inputs()[1:], "branch 1 of slot 0 follows no branch 0"),
        ([branch_inputs()[0], branch_inputs()[2]], "branch 2 of slot 0 follows no branch 1"),
        ([branch_inputs(1)[0], branch_inputs()[1]], "branch 1 of slot 0 follows no branch 0"),
        ([branch_inputs()[0], StepInput(0, [1], branch=1)], "each with `overwrite`"),
        ([StepInput(0, [1]), branch_inputs()[1]], "each with `overwrite`"),
        (branch_inputs()[:1] * 2, "are not different slots"),
    ],
    ids=["no first", "a gap", "another slot", "staged", "behind staged", "twice"],
)
def test_branches_that_do_not_follow_each_other_are_refused(
    inputs: list[StepInput], message: str
) -> None:
    model = tiny_model("softmax")
    state = prefilled(model, TEXT, TEXT)
    before = state.snapshot(0)
    with pytest.raises(ConfigError, match=message):
        model.step(inputs, state)
    assert_same_bytes(state.snapshot(0), before)


def test_branches_are_settled_before_the_next_step() -> None:
    model = tiny_model("softmax")
    state = prefilled(model, TEXT)
    model.step(branch_inputs(), state)
    for given in (StepInput(0, [1]), branch_inputs()[0]):
        with pytest.raises(StateError, match="slot 0 has 3 branches; keep one of them"):
            model.step([given], state)
    with pytest.raises(StateError, match="no branch 4; its last step had branches 0 to 3"):
        state.keep_branch(0, 4)
    state.drop(0)
    assert state.branches(0) == 0
    feed(model, state, [1])
    state = model.new_state(1, "guest-paged:block=3")
    feed(model, state, TEXT)
    with pytest.raises(StateError, match="keeps no branches of a slot; use a cache that does"):
        model.step(branch_inputs(), state)


# ---- kinds of caches


@pytest.mark.parametrize("kind", [*STATES.names(), "guest-paged:block=3"])
def test_every_kind_of_cache_goes_through_a_model(kind: str) -> None:
    """Chains in pieces, a tree, a long chain and a fork: as the kind 'float' within its rounding."""
    model = tiny_model("softmax", "window", "aug")
    close = 1e-10 if kind in ("float", *(s for s in (kind,) if "paged" in s)) else 0.3
    plain, state = model.new_state(3), model.new_state(3, kind)
    for each in (plain, state):
        feed(model, each, TEXT)
        model.step([StepInput(0, [1, 2, 3, 4], [-1, 0, 0, 2])], each)
        each.commit(0, [0, 2, 3])
        feed(model, each, random_tokens(70))
        each.fork(0, 2)
        feed(model, each, [7, 8], slot=2)
        feed(model, each, [9], slot=1)
    step = [StepInput(0, [1]), StepInput(1, [2, 3]), StepInput(2, [4, 5, 6], [-1, 0, 0])]
    expected, found = (model.step(step, each).logits for each in (plain, state))
    assert_close(found, expected, atol=close)


def test_an_unknown_kind_of_cache_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown KV cache 'paper'; known: .*float"):
        tiny_model("softmax").new_state(1, "paper")
    with pytest.raises(ConfigError, match="nothing to keep as bfloat16"):
        tiny_model("aug").new_state(1, "bfloat16")


def test_forks_of_a_paged_cache_share_their_blocks() -> None:
    model = tiny_model("softmax")
    state = model.new_state(3, "guest-paged:block=4")
    feed(model, state, random_tokens(10))
    (cache,) = state.parts
    assert isinstance(cache, paged_state.PagedCache)
    used = sum(users > 0 for users in cache.users)
    state.fork(0, 1)
    state.fork(0, 2)
    assert sum(users > 0 for users in cache.users) == used == 3
    feed(model, state, [1], slot=1)
    # the full blocks are shared still, the open one was copied
    assert sum(users > 0 for users in cache.users) == 4
    for slot in range(3):
        state.reset(slot)
    assert not any(cache.users)
