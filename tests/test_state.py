"""State as a transaction: what a step must not touch, copies, sizes, precision."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CASES,
    GROUP,
    MIXER_NAMES,
    SINKS,
    TAPS,
    WINDOW,
    assert_close,
    assert_same_bytes,
    feed,
    mixer_config,
    prefilled,
    random_tokens,
    remembered,
    tiny_model,
)

from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.decoding.tree import chain_shape, from_paths
from linspec.errors import StateError
from linspec.models.decoder import Decoder
from linspec.state.contract import StateOptions
from linspec.state.grouped import GroupedSpec, GroupedState, add_products
from linspec.state.sequence_states import SequenceStates

HYBRID = ("softmax", "aug", "window", "relu", "local", "global")
MODELS = [pytest.param((mixer_config(name, taps),), id=f"{name}-{taps}") for name, taps in CASES]
MODELS.append(pytest.param(HYBRID, id="hybrid"))
Layers = tuple[object, ...]
TREE = from_paths(1, [(2, 3, 4, 5, 6, 7, 8, 9), (2, 4), (5,)])
LENGTHS = (0, 1, GROUP - 1, GROUP, 2 * WINDOW + 1)


# ---- verification leaves the committed state alone


@pytest.mark.crossed(3)
@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_leaves_committed_bytes_and_other_slots_alone(layers: Layers, length: int) -> None:
    model = tiny_model(*layers)
    state = prefilled(model, random_tokens(length), [1, 2, 3])
    before = state.snapshot(0), state.snapshot(1)
    for new in (StepInput.tree(0, TREE), StepInput(0, [3, 4], [len(TREE) - 1, 0])):
        model.step([new], state)
        assert_same_bytes(state.snapshot(0), before[0])
        assert_same_bytes(state.snapshot(1), before[1])
    state.drop(0)
    assert_same_bytes(state.snapshot(0), before[0])
    model.step([StepInput(0, random_tokens(MAX_STAGED + 2))], state)
    assert_same_bytes(state.snapshot(0), before[0])
    state.commit(0, [])
    assert_same_bytes(state.snapshot(0), before[0])


@pytest.mark.parametrize("layers", MODELS)
def test_a_commit_leaves_other_slots_and_their_staged_nodes_alone(layers: Layers) -> None:
    model = tiny_model(*layers)
    state = prefilled(model, [1, 2, 3], [4, 5])
    before = state.snapshot(1)
    model.step([StepInput.tree(0, TREE), StepInput.tree(1, TREE)], state)
    state.commit(0, TREE.path_to(5))
    assert_same_bytes(state.snapshot(1), before)
    state.commit(1, TREE.path_to(3))
    assert_close(
        remembered(model, state, 1), remembered(model, prefilled(model, [4, 5, 1, 2, 3, 4]))
    )


# ---- copies


@pytest.mark.crossed(6)
@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_restore_brings_back_what_snapshot_saw(layers: Layers, length: int) -> None:
    model = tiny_model(*layers)
    state = prefilled(model, random_tokens(length), random_tokens(9, seed=1))
    copy = state.snapshot(0)
    expected = model.step([StepInput.tree(0, TREE)], state).logits
    state.commit(0, TREE.path_to(4))
    feed(model, state, random_tokens(80, seed=2))
    assert len(copy) == len(state.parts)
    for slot in (0, 1):
        state.restore(slot, copy)
        assert not state.staged(slot)
        assert_same_bytes(state.snapshot(slot), copy)
        assert torch.equal(model.step([StepInput.tree(slot, TREE)], state).logits, expected)


@pytest.mark.parametrize("layers", MODELS)
def test_a_fork_goes_its_own_way(layers: Layers) -> None:
    model, text = tiny_model(*layers), random_tokens(2 * GROUP + 1)
    state = prefilled(model, text, [1])
    state.fork(0, 1)
    assert_same_bytes(state.snapshot(1), state.snapshot(0))
    feed(model, state, [2, 3, 4, 5], slot=1)
    feed(model, state, [6], slot=0)
    assert_close(remembered(model, state, 0), remembered(model, prefilled(model, [*text, 6])))
    assert_close(
        remembered(model, state, 1), remembered(model, prefilled(model, [*text, 2, 3, 4, 5]))
    )


def test_a_fork_to_itself_changes_nothing() -> None:
    state = prefilled(tiny_model(*HYBRID), random_tokens(7))
    before = state.snapshot(0)
    state.fork(0, 0)
    assert_same_bytes(state.snapshot(0), before)


def test_a_snapshot_fits_a_state_with_smaller_buffers() -> None:
    model, text = tiny_model("softmax"), random_tokens(3 * MAX_STAGED)
    copy = prefilled(model, text).snapshot(0)
    state = model.new_state()
    state.restore(0, copy)
    assert_close(remembered(model, state), remembered(model, prefilled(model, text)))


@pytest.mark.parametrize(
    "other",
    [
        ("aug",),
        ("aug", "aug", "aug"),
        ("grouped", "grouped"),
        (mixer_config("aug", TAPS + 1), mixer_config("aug", TAPS + 1)),
        (mixer_config("aug", group=GROUP + 1), mixer_config("aug", group=GROUP + 1)),
        (mixer_config("local", TAPS), mixer_config("local", TAPS)),
        ("aug", "softmax"),
        ("softmax", "softmax"),
    ],
    ids=str,
)
def test_a_snapshot_of_another_model_is_refused_and_nothing_changes(other: Layers) -> None:
    layers = other * 2 if len(other) == 1 else other
    state = prefilled(tiny_model("aug", "aug"), random_tokens(6))
    if other == ("aug",):
        copy = prefilled(tiny_model("aug", "aug", kv_heads=4), [1]).snapshot(0)
    else:
        copy = prefilled(tiny_model(*layers), [1]).snapshot(0)
    before = state.snapshot(0)
    with pytest.raises(StateError, match="does not fit"):
        state.restore(0, copy)
    assert_same_bytes(state.snapshot(0), before)


def test_a_snapshot_that_fits_in_part_is_refused_whole() -> None:
    state = prefilled(tiny_model("softmax", "aug"), random_tokens(6))
    copy = prefilled(tiny_model("softmax", mixer_config("aug", TAPS + 1)), [1]).snapshot(0)
    before = state.snapshot(0)
    with pytest.raises(StateError, match="does not fit"):
        state.restore(0, copy)
    assert_same_bytes(state.snapshot(0), before)


# ---- what is left behind


@pytest.mark.parametrize("layers", MODELS)
def test_reset_leaves_no_trace(layers: Layers) -> None:
    model = tiny_model(*layers)
    state = prefilled(model, random_tokens(90), random_tokens(7))
    model.step([StepInput.tree(0, TREE)], state)
    state.reset(0)
    fresh = model.new_state()
    assert state.length(0) == 0
    assert not state.staged(0)
    assert_same_bytes(state.snapshot(0), fresh.snapshot(0))
    step = [StepInput.tree(0, TREE)]
    assert torch.equal(model.step(step, state).logits, model.step(step, fresh).logits)


@torch.inference_mode()
def poison(state: SequenceStates, slot: int, *, committed: bool) -> None:
    """NaN in every row of `slot` behind the committed ones, or everywhere."""
    for part in state.parts:
        rows = 0 if committed else part.lengths[slot] - part.base_positions[slot]
        part.keys[:, slot, :, rows:] = torch.nan
        part.values[:, slot, :, 0 if committed else part.spec.conv_history + rows :] = torch.nan
        if committed and part.sums.numel():
            part.sums[:, slot] = torch.nan


@pytest.mark.crossed(4)
@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_of_one_row_reads_only_rows_that_were_written(layers: Layers, length: int) -> None:
    model, text = tiny_model(*layers), random_tokens(length)
    state, clean = prefilled(model, text), prefilled(model, text)
    poison(state, 0, committed=False)
    for new in (StepInput.tree(0, TREE), StepInput(0, [3, 4], [2, 0])):
        assert torch.equal(model.step([new], state).logits, model.step([new], clean).logits)
    state.commit(0, TREE.path_to(6))
    clean.commit(0, TREE.path_to(6))
    assert_same_bytes(state.snapshot(0), clean.snapshot(0))


@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize("how", ["reset", "restore"])
def test_a_sequence_that_ended_in_nan_leaves_no_trace_in_a_ragged_batch(
    layers: Layers, how: str
) -> None:
    """Short rows of a ragged batch weigh rows they do not see with 0; those must be finite."""
    model = tiny_model(*layers)
    state = prefilled(model, [], random_tokens(GROUP + 2))
    copy = state.snapshot(0)
    poison(state, 0, committed=True)
    state.reset(0) if how == "reset" else state.restore(0, copy)
    out = model.step([StepInput(0, [3]), StepInput.tree(1, TREE)], state)
    expected = model.step([StepInput(0, [3])], model.new_state()).logits
    assert_close(out.logits[:1], expected)


# ---- sizes


WIDTH = 4
# floats of a row beside key and value; shape of the sums
DENOMINATOR = (1, (WIDTH, WIDTH + 1))
SIZES: dict[str, tuple[int, tuple[int, int]]] = {
    "softmax": (0, (0, 0)),
    "pages": (0, (0, 0)),
    "delta": (0, (0, 0)),
    # the queries that share a key lie beside it
    "h2o": (2 * WIDTH, (5, 2 * WIDTH + 1)),
    "snapkv": (2 * WIDTH, (5, 2 * WIDTH + 1)),
    "tidal": (0, (0, 0)),
    # a key ahead of its rotation lies beside it
    "shadow": (WIDTH, (0, 0)),
    "streaming": (0, (SINKS, 2 * WIDTH + 1)),
    "window": (0, (0, 0)),
    "local": (0, (0, 0)),
    "global": (0, (WIDTH, WIDTH)),
    "grouped": (0, (WIDTH, WIDTH)),
    "aug": (0, (WIDTH, WIDTH)),
    "relu": DENOMINATOR,
    "hedgehog": (1, (2 * WIDTH, WIDTH + 1)),
    "performer": (1, (6, WIDTH + 1)),
    "rfa": (1, (12, WIDTH + 1)),
    "transnormer": (0, (WIDTH, WIDTH)),
    "yoso": (0, (17, WIDTH)),
    "linformer": (0, (4, 2 * WIDTH + 1)),
    "gla": (WIDTH, (WIDTH, WIDTH)),
    "gdn": (2, (WIDTH, WIDTH)),
}
# that keep every token
GROWING = ("softmax", "pages", "delta", "tidal", "by-head")
# that keep something of every token
SHADOWS = ("shadow",)
# whose further floats lie beside the key, not the value
GATED = ("gla", "gdn", "h2o", "snapkv", "shadow")


def shadow_bytes(context: int, span: int) -> int:
    """What closed segments of two chunks leave: rank 4, and an outlier a KV head, numbered in 4 bytes."""
    left, right = GROUP * 4, 2 * 4 * WIDTH
    landmarks, outliers, values = 2 * 2 * WIDTH, 2 * 2 * 2 * WIDTH, 2 * GROUP * WIDTH
    segments = max(0, context // GROUP + 1 - span)
    return segments * (8 * (left + right + landmarks + outliers + values) + 2 * 4)


def expected_bytes(name: str, taps: int, context: int, span: int) -> int:
    """Floats of one layer with 2 KV heads of width 4, times 8 bytes."""
    name = name.partition(":")[0]
    if name == "by-head":
        # one KV head of each
        halves = (expected_bytes(part, taps, context, span) for part in ("softmax", "streaming"))
        return sum(halves) // 2
    kept = {**dict.fromkeys(GROWING, context), "window": WINDOW}
    rows = kept.get(name, span * GROUP)
    more, sums = SIZES[name]
    value = WIDTH + (0 if name in GATED else more)
    past = shadow_bytes(context, span) if name in SHADOWS else 0
    return past + 2 * 8 * (sums[0] * sums[1] + rows * (2 * WIDTH + more) + max(0, taps - 1) * value)


@pytest.mark.parametrize(("name", "taps"), CASES)
def test_state_bytes_follow_the_formula_and_only_softmax_grows(name: str, taps: int) -> None:
    model = tiny_model(mixer_config(name, taps))
    state = model.new_state()
    for context in (WINDOW, 50, 300):
        feed(model, state, random_tokens(context - state.length(0)))
        spans = [config.span for config in model.config.mixers]
        expected = sum(expected_bytes(name, taps, context, span) for span in spans)
        assert state.bytes(0) == state.bytes_at(context) == expected


def allocated(state: SequenceStates) -> int:
    return sum(t.numel() for part in state.parts for t in (part.keys, part.values, part.sums))


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", [name for name in MIXER_NAMES if name not in (*GROWING, *SHADOWS)])
def test_allocated_memory_does_not_grow_with_the_context(name: str) -> None:
    """It once did: a long prefill made room in the buffers, which it does not use."""
    model = tiny_model(name)
    state = model.new_state(2)
    before = allocated(state)
    feed(model, state, random_tokens(500))
    for start in range(0, 60, 3):
        feed(model, state, random_tokens(3, seed=start))
    assert allocated(state) == before


def test_layers_of_one_kind_share_a_part() -> None:
    state = tiny_model("softmax", "aug", "softmax", "aug", "grouped").new_state()
    assert [part.layers for part in state.parts] == [2, 2, 1]
    assert [index for _, index in state.layers] == [0, 0, 1, 1, 0]


# ---- precision


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_sums_are_kept_in_float32_or_wider(dtype: torch.dtype, sums: torch.dtype) -> None:
    model = tiny_model("aug", dtype=dtype)
    state = prefilled(model, random_tokens(3 * GROUP))
    part = state.parts[0]
    assert (part.keys.dtype, part.values.dtype, part.sums.dtype) == (dtype, dtype, sums)
    assert model.step([StepInput(0, [1, 2])], state).logits.dtype == dtype


@torch.inference_mode()
def test_sums_over_many_groups_are_far_better_than_bf16_running_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = GroupedSpec(kv_heads=1, key_width=4, value_width=4, group=GROUP, sum_width=4)
    state = GroupedState(spec, [add_products], 1, StateOptions(dtype=torch.bfloat16))
    exact = torch.zeros(4, 4, dtype=torch.float64)
    running = torch.zeros(4, 4, dtype=torch.bfloat16)
    for _ in range(1000):
        k, v = torch.rand(2, 1, 1, GROUP, 4, generator=generator).bfloat16()
        state.stage(0, 0, [GROUP], k, v)
        state.record(0, chain_shape(GROUP))
        state.commit(0, range(GROUP))
        exact += k[0, 0].double().T @ v[0, 0].double()
        running += k[0, 0].T @ v[0, 0]
    error = (state.sums[0, 0, 0].double() - exact).abs().max() / exact.abs().max()
    naive = (running.double() - exact).abs().max() / exact.abs().max()
    assert error < 1e-5
    assert naive > 1e-2


def long_run(model: Decoder, tokens: list[int]) -> torch.Tensor:
    state = model.new_state()
    return torch.cat([feed(model, state, tokens[i : i + 3]) for i in range(0, len(tokens), 3)])


@pytest.mark.crossed(10)
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_float32_stays_close_to_float64_over_many_groups(name: str) -> None:
    tokens = random_tokens(300)
    single, double = (
        long_run(tiny_model(name, dtype=d), tokens) for d in (torch.float32, torch.float64)
    )
    assert_close(single.double(), double, atol=1e-3)
