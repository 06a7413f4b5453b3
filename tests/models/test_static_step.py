"""The step of static shape: equal to the step by layers, with nothing in it that Python decides anew."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.step import StepInput, Want
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError
from linspec.kernels.gpu.choice import PLAIN
from linspec.kernels.gpu.graphs import CudaGraphs, Recorded, recorder_for
from linspec.models.decoder import Decoder
from linspec.models.static_step import StaticStep, why_not_static
from linspec.state.sequence_states import SequenceStates
from tests.helpers import (
    CASES,
    VOCAB,
    assert_close,
    assert_same_bytes,
    feed,
    random_tokens,
    random_tree,
    tiny_model,
)
from tests.op_tape import TapeRecorder

# whose nodes decide by what they read, or whose states are no buffers
OTHERS = {"pages", "delta", "tidal", "shadow", "h2o", "snapkv", "linformer"}
STATIC = [(name, taps) for name, taps in CASES if name.partition(":")[0] not in OTHERS]


def pair(name: str, taps: int = 0, **switches: object) -> tuple[Decoder, Decoder, TapeRecorder]:
    """A model by layers, the same one with recorded steps, and what records them."""
    plain, static = (tiny_model(name, taps=taps, **switches).to_inference() for _ in range(2))
    recorder = TapeRecorder()
    plain.native = None
    static.native = StaticStep(static, recorder)
    return plain, static, recorder


def read_in_torch(name: str, taps: int = 0, **switches: object) -> tuple[Decoder, Decoder]:
    """A model by layers, and one whose steps read by what kernels are proved against."""
    plain, static, _ = pair(name, taps, **switches)
    static.native = StaticStep(static, None, PLAIN)
    return plain, static


def both(
    models: Sequence[Decoder], states: Sequence[SequenceStates], inputs: Sequence[StepInput]
) -> None:
    """One step of both models: the same logits and hidden states."""
    want = Want(layers=(0,))
    one, other = (m.step(inputs, s, want=want) for m, s in zip(models, states, strict=True))
    # inputs of several kinds may come out in another order
    for mine, theirs in zip(one.slices, other.slices, strict=True):
        assert_close(one.logits[mine], other.logits[theirs])
        assert_close(one.hidden[mine], other.hidden[theirs])
    for mine, theirs in zip(one.nodes, other.nodes, strict=True):
        assert_close(one.layers[0][mine], other.layers[0][theirs])


@pytest.mark.crossed(3)
@pytest.mark.parametrize(("name", "taps"), STATIC)
def test_replayed_trees_equal_the_step_by_layers(name: str, taps: int) -> None:
    plain, static, recorder = pair(name, taps)
    models, states = (plain, static), [m.new_state(1) for m in (plain, static)]
    rng = random.Random(1)
    for _ in range(14):
        tree = random_tree(rng, rng.choice((1, 3, 4, 7)))
        both(models, states, [StepInput.tree(0, tree)])
        path = tree.path_to(rng.randrange(len(tree)))
        for state in states:
            state.commit(0, path)
    # sizes 1, 4 and 8, each recorded once
    assert recorder.recorded == 3
    for one, other in zip(*(state.snapshot(0) for state in states), strict=True):
        assert one.length == other.length
        assert_close(one.keys, other.keys)
        assert_close(one.values, other.values)
        if one.sums is not None:
            assert_close(one.sums, other.sums)


@settings(max_examples=settings().max_examples * 25 // 20)
@given(
    seed=st.integers(0, 2**20), name=st.sampled_from(["softmax", "aug", "gla", "by-head", "window"])
)
def test_any_history_of_several_slots(seed: int, name: str) -> None:
    plain, static, _ = pair(name, 3)
    rng, slots = random.Random(seed), 3
    models, states = (plain, static), [m.new_state(slots) for m in (plain, static)]
    for slot in range(slots):
        prompt = random_tokens(rng.randrange(1, 12), seed + slot)
        for model, state in zip(models, states, strict=True):
            feed(model, state, prompt, slot)
    for _ in range(5):
        chosen = sorted(rng.sample(range(slots), rng.randint(1, slots)))
        grown = {slot: random_tree(rng, rng.randint(1, 6)) for slot in chosen}
        both(models, states, [StepInput.tree(slot, tree) for slot, tree in grown.items()])
        for slot, tree in grown.items():
            path = tree.path_to(rng.randrange(len(tree)))
            for state in states:
                state.commit(slot, path) if rng.random() < 2 else state.drop(slot)


def test_which_mixers_have_a_static_step() -> None:
    """Of each mixer it is said, and the ones above are all that have one."""
    has = {
        name
        for name, taps in CASES
        if why_not_static(tiny_model(name, taps=taps).to_inference()) is None
    }
    assert has == {name for name, _ in STATIC}
    assert why_not_static(tiny_model("tidal").to_inference()) == (
        "mixers tidal have no step of static shape"
    )


def test_a_mixer_that_attends_in_its_own_way_has_to_say_so() -> None:
    model = tiny_model("softmax").to_inference()
    mixer = model.layers[0].mixer

    class Own(type(mixer)):  # type: ignore[misc]
        def attend(self, *given: object) -> object:
            return super().attend(*given)

    mixer.__class__ = Own
    assert why_not_static(model) is not None


@pytest.mark.parametrize(("name", "taps"), STATIC)
def test_steps_that_read_by_kernels_equal_the_step_by_layers(name: str, taps: int) -> None:
    """Trees and chains of slots in any order, over borders of groups, and what commits fold."""
    plain, static = read_in_torch(name, taps)
    models, states, slots = (plain, static), [m.new_state(4) for m in (plain, static)], 4
    rng = random.Random(3)
    for slot in (1, 3):
        prompt = random_tokens(rng.randrange(1, 12), slot)
        for model, state in zip(models, states, strict=True):
            feed(model, state, prompt, slot)
    for nodes in (1, 5, 2, 7, 1, 9):
        chosen = sorted(rng.sample(range(slots), rng.randint(1, slots)))
        grown = {slot: random_tree(rng, nodes, reach=rng.choice((1, None))) for slot in chosen}
        both(models, states, [StepInput.tree(slot, tree) for slot, tree in grown.items()])
        for slot, tree in grown.items():
            path = tree.path_to(rng.randrange(len(tree)))
            for state in states:
                state.commit(slot, path)
    for slot in range(slots):
        for one, other in zip(*(state.snapshot(slot) for state in states), strict=True):
            assert_close(one.keys, other.keys)
            if one.sums is not None:
                assert_close(one.sums, other.sums)


def test_kernels_read_the_buffers_themselves() -> None:
    """Not copies of the slots of a step, of 16 bits either."""
    _, static = read_in_torch("softmax", 3)
    state, found = static.new_state(3, "float16"), []

    def watched(q: torch.Tensor, *given: torch.Tensor, **named: object) -> torch.Tensor:
        found.append(given)
        return PLAIN.tree_attention(q, *given, **named)

    static.native = StaticStep(static, None, replace(PLAIN, tree_attention=watched))
    static.step([StepInput(0, [3]), StepInput(2, [4, 5], (-1, 0))], state)
    part = state.parts[0]
    for layer, (keys, values, slots, *_) in enumerate(found):
        assert keys.data_ptr() == part.keys[layer].data_ptr()
        # behind the history of the convolution
        assert values.data_ptr() == part.values[layer, :, :, 2:].data_ptr()
        assert slots.tolist() == [0, 2]


def test_which_mixers_kernels_read() -> None:
    """Of each mixer with a static step it is said whether kernels compute it."""
    reads = {
        name
        for name, taps in STATIC
        if StaticStep(tiny_model(name, taps=taps).to_inference(), None, PLAIN).reads
    }
    others = {"hedgehog", "performer", "rfa", "yoso"}
    assert {name.partition(":")[0] for name, _ in STATIC if name not in reads} == others
    both_kinds = StaticStep(tiny_model("aug", "yoso").to_inference(), None, PLAIN)
    assert both_kinds.named() == "aug by kernels, yoso by operations of torch"


@pytest.mark.parametrize("kv", ["int8", "int4", "float16"])
def test_entries_in_other_formats(kv: str) -> None:
    plain, static, _ = pair("softmax")
    models, states = (plain, static), [m.new_state(2, kv) for m in (plain, static)]
    for slot in range(2):
        for model, state in zip(models, states, strict=True):
            feed(model, state, random_tokens(9, slot), slot)
    tree = random_tree(random.Random(0), 5)
    both(models, states, [StepInput.tree(slot, tree) for slot in range(2)])
    for state in states:
        state.commit(1, tree.path_to(4))
        state.drop(0)
    both(models, states, [StepInput(1, [3])])


def test_nodes_that_are_staged_over_several_steps() -> None:
    plain, static, _ = pair("aug", 3)
    models, states = (plain, static), [m.new_state(2) for m in (plain, static)]
    for model, state in zip(models, states, strict=True):
        feed(model, state, random_tokens(6), 1)
    both(models, states, [StepInput(1, [3, 4], (-1, 0))])
    both(models, states, [StepInput(1, [5, 6, 7], (0, 1, 2))])
    for state in states:
        state.commit(1, (0, 2))
    both(models, states, [StepInput(0, [2]), StepInput(1, [8])])


def test_sixty_four_staged_nodes_have_bits_of_their_own() -> None:
    plain, static, _ = pair("softmax")
    models, states = (plain, static), [m.new_state(1) for m in (plain, static)]
    tree = TokenTree(tuple(random_tokens(64)), tuple(range(-1, 63)))
    both(models, states, [StepInput.tree(0, tree)])


def test_what_it_does_not_take_goes_by_layer() -> None:
    plain, static, recorder = pair("softmax")
    models, states = (plain, static), [m.new_state(2) for m in (plain, static)]
    # a prompt longer than what can be staged in place, beside a tree
    both(models, states, [StepInput(0, random_tokens(70)), StepInput(1, [3, 4], (-1, 0))])
    assert recorder.recorded == 1
    for state in states:
        state.commit(0, range(70))
        state.drop(1)
    given = torch.randn(1, plain.config.width, dtype=plain.dtype)
    both(models, states, [StepInput(1, [3], embeddings=given)])
    assert recorder.recorded == 1


def test_buffers_that_moved_are_recorded_again() -> None:
    plain, static, recorder = pair("softmax")
    models, states = (plain, static), [m.new_state(1) for m in (plain, static)]
    for _ in range(3):
        both(models, states, [StepInput(0, [5])])
        for state in states:
            state.commit(0, (0,))
    assert recorder.recorded == 1
    kept = states[1].snapshot(0)
    for model, state in zip(models, states, strict=True):
        feed(model, state, random_tokens(400))
    both(models, states, [StepInput(0, [5])])
    assert recorder.recorded == 2
    # and the other way round: what was recorded where they lay before is not run there again
    states[1].drop(0)
    states[1].restore(0, kept)
    again = static.step([StepInput(0, [5])], states[1]).logits
    fresh = plain.new_state(1)
    feed(plain, fresh, [5, 5, 5])
    assert_close(again, plain.step([StepInput(0, [5])], fresh).logits)


def test_a_branching_state_and_its_copy_do_not_share_programs() -> None:
    _, static, recorder = pair("aug", 3)
    states = [static.new_state(1) for _ in range(2)]
    logits = [static.step([StepInput(0, [5])], state).logits for state in states]
    assert recorder.recorded == 2
    assert torch.equal(*logits)
    for state in states:
        state.commit(0, (0,))
    assert_same_bytes(states[0].snapshot(0), states[1].snapshot(0))


@pytest.mark.parametrize("name", ["softmax", "window", "aug", "gla", "streaming", "by-head"])
def test_what_a_rejected_node_left_behind_is_not_read(name: str) -> None:
    """It may be NaN, which no weight of zero takes away."""
    plain, static, _ = pair(name, 3)
    models, states = (plain, static), [m.new_state(1) for m in (plain, static)]
    for model, state in zip(models, states, strict=True):
        feed(model, state, random_tokens(6))
    with torch.inference_mode():
        for part in states[1].parts:
            held, history = part.held(0), part.spec.conv_history
            part.keys[:, 0, :, held:] = torch.nan
            part.values[:, 0, :, history + held :] = torch.nan
    both(models, states, [StepInput.tree(0, random_tree(random.Random(0), 3))])


def test_a_tree_behind_branches() -> None:
    """The places of branches lie behind the slots of a state."""
    plain, static, _ = pair("softmax")
    models, states = (plain, static), [m.new_state(1) for m in (plain, static)]
    for model, state in zip(models, states, strict=True):
        feed(model, state, random_tokens(6))
        over = [StepInput(0, [5, 6], overwrite=(3, 4), branch=branch) for branch in (0, 1)]
        model.step(over, state)
        state.keep_branch(0, 1)
    both(models, states, [StepInput.tree(0, random_tree(random.Random(0), 3))])


def test_threads_that_share_a_model_wait_for_each_other() -> None:
    plain, static, _ = pair("aug", 3)
    static.native = StaticStep(static, None)

    def decode(model: Decoder, first: int) -> torch.Tensor:
        state, found = model.new_state(1), []
        for token in range(first, first + 25):
            found.append(model.step([StepInput(0, [token % VOCAB])], state).logits)
            state.commit(0, (0,))
        return torch.cat(found)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(partial(decode, static), range(4)))
    for first, logits in enumerate(found):
        assert_close(logits, decode(plain, first))


def test_results_outlive_the_next_step() -> None:
    _, static, _ = pair("softmax")
    state = static.new_state(1)
    first = static.step([StepInput(0, [5])], state)
    kept = first.logits.clone(), first.hidden.clone()
    state.commit(0, (0,))
    static.step([StepInput(0, [6])], state)
    assert torch.equal(first.logits, kept[0])
    assert torch.equal(first.hidden, kept[1])


def test_the_least_recently_used_program_is_dropped() -> None:
    recorder = TapeRecorder()
    programs, x = Recorded(recorder, kept=2), torch.zeros(1)
    for key in ("a", "b", "a", "c", "a", "b"):
        programs.run(key, lambda: x + 1)
    # "b" was dropped for "c"
    assert (recorder.recorded, len(programs)) == (4, 2)


def test_a_program_that_waits_for_the_device_is_not_recorded() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"):
        Recorded(TapeRecorder()).run("", lambda: x * float(x.sum()))


@pytest.mark.parametrize(
    ("value", "message"),
    [("on", "has no CUDA graphs; use 'auto', or --device cuda"), ("onn", "did you mean 'on'?")],
)
def test_the_switch_is_checked(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv("LINSPEC_CUDA_GRAPHS", value)
    with pytest.raises(ConfigError) as error:
        recorder_for(torch.device("cpu"))
    assert message in str(error.value)
    with pytest.raises(ConfigError):
        tiny_model("softmax").to_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "taps"), STATIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_gives_the_bits_of_its_program(
    name: str, taps: int, dtype: torch.dtype
) -> None:
    model = tiny_model(name, taps=taps, dtype=dtype, device="cuda").to_inference()
    rng, steps = random.Random(2), []
    for native in (StaticStep(model, CudaGraphs()), StaticStep(model, None)):
        model.native, rng = native, random.Random(2)
        state, found = model.new_state(1), []
        for _ in range(8):
            tree = random_tree(rng, rng.choice((1, 3, 4)))
            found.append(model.step([StepInput.tree(0, tree)], state).logits)
            state.commit(0, tree.path_to(rng.randrange(len(tree))))
        steps.append(found)
    for graph, program in zip(*steps, strict=True):
        assert torch.equal(graph, program)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["softmax", "aug", "gla"])
def test_a_model_on_cuda_records_its_steps(name: str) -> None:
    plain = tiny_model(name, device="cuda").to_inference()
    assert isinstance(plain.native, StaticStep)
    static = tiny_model(name, device="cuda").to_inference()
    plain.native = None
    models, states = (plain, static), [m.new_state(1) for m in (plain, static)]
    for model, state in zip(models, states, strict=True):
        feed(model, state, random_tokens(9))
    both(models, states, [StepInput.tree(0, random_tree(random.Random(0), 5))])
