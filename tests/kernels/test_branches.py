"""Branches in one call: by layers and as steps one after the other, on every set and thread count.

A history is canvases that are computed whole, then steps in which some of them branch, of which one is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_overwriting import (
    CACHES,
    CLOSE,
    DENOISERS,
    QUANTIZED,
    VOCAB,
    by_layers,
    causal,
    denoiser,
    held,
    kept,
    over,
    same,
)

from linspec.decoding.step import StepInput
from linspec.errors import ConfigError, StateError
from linspec.kernels.cpu.library import instruction_sets, load
from linspec.models.decoder import Decoder
from linspec.state.branches import carried
from linspec.state.sequence_states import SequenceStates

# the inputs of a step, and the branch that each slot goes on with
Step = tuple[list[StepInput], dict[int, int]]


@st.composite
def histories(draw: st.DrawFn, longest: int = 150) -> tuple[list[int], list[Step]]:
    """Lengths of canvases, and steps of some of them: alike branches, or ones that compute what they like."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    steps: list[Step] = []
    for number in range(draw(st.integers(1, 3))):
        slots = sorted(draw(st.sets(st.sampled_from(range(len(lengths))), min_size=1)))
        inputs = [
            each for slot in slots for each in branches(draw, slot, lengths[slot], 10 * number)
        ]
        last = {each.slot: each.branch for each in inputs}
        steps.append((inputs, {slot: draw(st.integers(0, most)) for slot, most in last.items()}))
    return lengths, steps


def branches(draw: st.DrawFn, slot: int, length: int, seed: int) -> list[StepInput]:
    alike, random = draw(st.booleans()), draw(st.randoms(use_true_random=False))
    found: list[StepInput] = []
    for branch in range(draw(st.integers(1, 4))):
        positions = random.sample(range(length), draw(st.integers(1, length)))
        if alike and found:
            assert found[0].overwrite is not None
            positions = list(found[0].overwrite)
        wanted = sorted(random.sample(range(len(positions)), random.randint(1, len(positions))))
        each = over(slot, positions, slot + seed + branch + 1, logits_of=wanted)
        found.append(replace(each, branch=branch))
    return found


def together(model: Decoder, kv: str, lengths: list[int], steps: list[Step]) -> list[torch.Tensor]:
    """Logits of every input, and what is left in the state."""
    state, found = held(model, kv, *lengths), []
    for inputs, chosen in steps:
        output = model.step(inputs, state)
        found += [output.logits[rows] for rows in output.slices]
        for slot, branch in chosen.items():
            state.keep_branch(slot, branch)
    return [*found, *left(state, len(lengths))]


def in_turn(model: Decoder, kv: str, lengths: list[int], steps: list[Step]) -> list[torch.Tensor]:
    """The same, branch by branch: what comes behind the kept one is taken back."""
    state, found = held(model, kv, *lengths), []
    for inputs, chosen in steps:
        copies = {}
        for each in inputs:
            found.append(model.step([replace(each, branch=0)], state).logits)
            if chosen[each.slot] == each.branch:
                copies[each.slot] = state.snapshot(each.slot)
        for slot, copy in copies.items():
            state.restore(slot, copy)
    return [*found, *left(state, len(lengths))]


def left(state: SequenceStates, slots: int) -> list[torch.Tensor]:
    return [tensor for slot in range(slots) for tensor in kept(state, slot)]


@settings(max_examples=settings().max_examples * 50 // 20)
@given(histories(), st.sampled_from(list(DENOISERS)), st.sampled_from([None, 8, 4]), st.data())
def test_branches_have_the_bits_of_steps_one_after_the_other(
    history: tuple[list[int], list[Step]], variant: str, bits: int | None, data: st.DataObject
) -> None:
    model, kv = denoiser(variant, bits), data.draw(st.sampled_from(CACHES))
    assert same(together(model, kv, *history), in_turn(model, kv, *history))


@settings(max_examples=12)
@given(histories(80), st.sampled_from(list(DENOISERS)), st.sampled_from([None, 8, 4]), st.data())
def test_branches_have_the_same_bits_on_every_set_and_thread_count(
    history: tuple[list[int], list[Step]], variant: str, bits: int | None, data: st.DataObject
) -> None:
    library, kv = load().library, data.draw(st.sampled_from(CACHES))
    if library is None:
        pytest.skip(load().reason)
    model, before = denoiser(variant, bits), library.ls_isa()
    expected = together(model, kv, *history)
    threads = torch.get_num_threads()
    try:
        for name in instruction_sets(library):
            assert library.ls_use_isa(name.encode())
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert same(together(model, kv, *history), expected), (name, count)
    finally:
        torch.set_num_threads(threads)
        assert library.ls_use_isa(before)


@settings(max_examples=settings().max_examples * 30 // 20)
@given(histories(), st.sampled_from(list(DENOISERS)), st.sampled_from([None, 8, 4]), st.data())
def test_branches_are_those_by_layers(
    history: tuple[list[int], list[Step]], variant: str, bits: int | None, data: st.DataObject
) -> None:
    model, kv = denoiser(variant, bits), data.draw(st.sampled_from(CACHES))
    lengths, steps = history
    count = sum(len(inputs) for inputs, _ in steps)
    native, found = model.native, []
    for form in (native, None):
        model.native = form
        try:
            found.append(together(model, kv, lengths, steps)[:count])
        finally:
            model.native = native
    for one, other in zip(*found, strict=True):
        if bits is None:
            torch.testing.assert_close(one, other, rtol=CLOSE[kv], atol=CLOSE[kv])
        else:
            assert float((one - other).norm() / other.norm()) < QUANTIZED


def branched(slot: int, *rows: Sequence[int]) -> list[StepInput]:
    return [replace(over(slot, at, n + 1), branch=n) for n, at in enumerate(rows)]


def test_what_happens_to_a_slot_between_steps_reaches_its_branches(isa: str) -> None:
    """Shorter, longer by tokens, shared and back, another text: each as a state that never had branches."""
    model = causal()
    states = [held(model, "float", 70, 9) for _ in range(2)]

    def settle(step: list[StepInput]) -> None:
        mine, other = states
        found = model.step(step, mine)
        mine.keep_branch(0, len(step) - 1)
        for each, rows in zip(step, found.slices, strict=True):
            alone = model.step([replace(each, branch=0)], other)
            assert torch.equal(alone.logits, found.logits[rows])
        assert same(left(mine, 2), left(other, 2))

    settle(branched(0, [3, 4], [4, 5], [1]))
    for state in states:
        model.step([over(0, [6, 60], 9)], state)
    settle(branched(0, [3], [2], [0], [9]))
    for state in states:
        state.shorten(0, 66)
        model.step([StepInput(0, [7, 8, 9, 1, 2])], state)
        state.commit(0, range(5))
        state.fork(0, 1)
    settle(branched(0, [70, 3], [2]))
    for state in states:
        state.restore(0, state.snapshot(1))
        # buffers of all slots grow, and lose nothing
        model.step([StepInput(1, [each % VOCAB for each in range(300)])], state)
        state.commit(1, range(300))
    settle(branched(0, [8], [2, 3], [3]))


def test_buffers_that_move_take_open_branches_along(isa: str) -> None:
    model = denoiser()
    state, alone = held(model, "float", 40, 5), held(model, "float", 40, 5)
    steps = branched(0, [3, 4], [4, 5], [1])
    model.step(steps, state)
    state.hold(1, 900)
    model.step(branched(1, range(900), [5], [6], [7]), state)
    state.keep_branch(0, 2)
    for each in steps:
        model.step([replace(each, branch=0)], alone)
    assert same(kept(state, 0), kept(alone, 0))


def test_a_step_that_fails_leaves_no_branches(isa: str) -> None:
    model = denoiser()
    state, alone = held(model, "float", 9), held(model, "float", 9)
    with pytest.raises(StateError, match="not all committed"):
        model.step([*branched(0, [1, 2]), replace(over(0, [9], 1), branch=1)], state)
    assert state.branches(0) == 0 and same(kept(state, 0), kept(alone, 0))


def test_branches_that_see_otherwise_are_refused() -> None:
    model = causal()
    first, second = branched(0, [1], [2])
    with pytest.raises(ConfigError, match="the same `causal`"):
        model.step([first, replace(second, causal=True)], held(model, "float", 9))


def test_branches_of_a_model_that_reads_forward_go_by_layers(isa: str) -> None:
    model, steps = causal(), [replace(each, causal=True) for each in branched(0, [3, 7], [4])]
    states = [held(model, "float", 20) for _ in range(2)]
    one, other = model.step(steps, states[0]), by_layers(model, steps, states[1])
    assert torch.equal(one.logits, other.logits)


@given(st.lists(st.sets(st.integers(0, 6), min_size=1), min_size=1, max_size=5))
def test_a_row_is_carried_up_to_who_overwrites_it(rows: list[set[int]]) -> None:
    ordered = [sorted(each) for each in rows]
    stands = [dict[int, int]() for _ in rows]
    for branch, counts in enumerate(carried(ordered)):
        for row, count in zip(ordered[branch], counts, strict=True):
            for at in range(branch, branch + count + 1):
                # nobody else writes it there
                assert row not in stands[at]
                stands[at][row] = branch
    last: dict[int, int] = {}
    for branch, each in enumerate(ordered):
        last.update(dict.fromkeys(each, branch))
        assert stands[branch] == last
