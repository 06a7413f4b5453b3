"""Linear mixers that see both ways, in one call: each as by layers, and no sum of a group is stale."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_overwriting import MASK, SHAPE, by_layers, held, kept, over, same

from linspec.decoding.step import StepInput
from linspec.errors import ConfigError
from linspec.kernels.step_plan import SummedPlan
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.linear import Quantizer
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.one_call import why_not
from linspec.state.canvas import Canvas
from linspec.state.sequence_states import SequenceStates

GROUP = 8


def config_of(name: str) -> MixerConfig:
    """A mixer by name, and the kernel of its near rows behind a colon."""
    if name == "taps":
        return MixerConfig(taps=3)
    name, _, kernel = name.partition(":")
    span = 1 if name == "global" else 2
    return MixerConfig(
        name=name, group=GROUP, span=span, taps=3 if name == "aug" else 0, kernel=kernel or "own"
    )


def _sums_both_ways(name: str) -> bool:
    """Whether there is such a linear mixer with a bidirectional form that a kernel could compute."""
    try:
        mixer = config_of(name)
        kind = MIXERS[mixer.name]
        plan = kind(tiny_config(mixer), mixer).requires_grad_(False).attention_plan()
    except ConfigError:
        return False
    return kind.bidirectional() and plan is not None and plan.group > 0 and plan.both_ways


_NAMES = [name for name in MIXERS.names() if not name.startswith("test")]
LINEAR = [
    name
    for name in (*_NAMES, *(f"{name}:softmax" for name in _NAMES), "grouped:relu2", "relu:relu2")
    if _sums_both_ways(name)
]


@cache
def model_of(*names: str, bits: int | None = None, **changes: Any) -> MaskedDiffusion:
    torch.manual_seed(0)
    mixers = tuple(MixerConfig() if name == "softmax" else config_of(name) for name in names)
    shape = SHAPE | {"layers": len(names), "mixers": mixers, "mask_id": MASK} | changes
    made = MaskedDiffusion(DiffusionConfig(**shape)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith(("alpha", "taps")):
                weight.normal_(0.0, 0.3)
    found = made.to_inference(Quantizer(bits, {})) if bits else made.to_inference()
    assert isinstance(found, MaskedDiffusion)
    return found


def test_every_linear_mixer_with_a_bidirectional_form_is_tried() -> None:
    assert {"aug", "grouped", "local", "global", "relu", "hedgehog", "yoso"} <= set(LINEAR)
    assert {"aug:softmax", "relu:softmax", "grouped:relu2"} <= set(LINEAR)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", [*LINEAR, "taps"])
def test_a_whole_canvas_and_a_block_of_it_are_those_by_layers(
    library: ctypes.CDLL, name: str, bits: int | None
) -> None:
    model = model_of(name, name, bits=bits)
    assert model.native is not None, why_not(model)
    native, found = model.native, []
    steps = [[over(0, range(71), 1)], [over(0, [*range(20, 27), 40, 3], 2)]]
    for form in (native, None):
        model.native = form
        state = held(model, "float", 71)
        found.append([model.step(each, state).logits for each in steps])
        model.native = native
    for one, other in zip(*found, strict=True):
        if bits is None:
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)
        else:
            assert float((one - other).norm() / other.norm()) < 0.1


def test_another_form_runs_layer_by_layer(library: ctypes.CDLL) -> None:
    mixer = MixerConfig(name="linformer", group=GROUP, features=2)
    config = DiffusionConfig(**SHAPE | {"mask_id": MASK, "mixers": (mixer,) * 3})
    model = MaskedDiffusion(config).eval().to_inference()
    assert model.native is None
    assert "mixers linformer see no later tokens" in str(why_not(model))


# ---- sums of groups


def canvas_of(state: SequenceStates) -> Canvas:
    found = [part for part in state.parts if isinstance(part, Canvas)]
    assert found
    return found[0]


def check_sums(model: MaskedDiffusion, state: SequenceStates) -> int:
    """Hold every sum that counts as made against its entries; returns how many there are."""
    part, seen = canvas_of(state), 0
    for (group, _, columns), sums in part.group_sums.items():
        for layer, slot, head, number in sums.rows.nonzero().tolist():
            rows = int(sums.rows[layer, slot, head, number])
            lie = slice(number * group, number * group + rows)
            keys = part.keys[layer, slot, head, lie].double()
            values = part.values[layer, slot, head, lie, :columns].double()
            attention = model.layers[layer].mixer.attention_plan()
            assert attention is not None and not isinstance(attention, SummedPlan)
            if not attention.squared_relu:
                keys = torch.nn.functional.normalize(keys, dim=-1)
            torch.testing.assert_close(
                sums.sums[layer, slot, head, number].double(),
                keys.mT @ values,
                rtol=1e-5,
                atol=1e-5,
            )
            seen += 1
    return seen


def test_sums_are_those_of_the_entries_in_double(library: ctypes.CDLL) -> None:
    for name in ("aug", "aug:softmax"):
        model = model_of(name, name)
        state = held(model, "float", 71, 40)
        assert check_sums(model, state)
        model.step([over(0, range(24, 32), 1), over(1, [0, 39], 2)], state)
        assert check_sums(model, state)


ACTIONS = ("step", "layers", "branches", "shorter", "longer", "copied", "anew")


@settings(max_examples=settings().max_examples * 2)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.randoms(use_true_random=False)), max_size=7))
def test_no_history_leaves_a_stale_sum(history: list[tuple[str, Any]]) -> None:
    """A step gives what it gives on a state that was just restored, whose sums are all made anew."""
    model = model_of("aug:softmax", "softmax", "aug")
    if model.native is None:
        pytest.skip(str(why_not(model)))
    state = held(model, "float", 50, 30)
    for number, (action, random) in enumerate(history):
        act(model, state, action, random, number)
    check_sums(model_of("aug:softmax", "aug"), state)
    length = state.length(0)
    inputs = [over(0, range(length // 3, 2 * length // 3 + 1), 99), over(1, [3, 29], 98)]
    fresh = model.new_state(2)
    for slot in (0, 1):
        fresh.restore(slot, state.snapshot(slot))
    found, wanted = model.step(inputs, state), model.step(inputs, fresh)
    assert torch.equal(found.logits, wanted.logits)
    for slot in (0, 1):
        assert same(kept(state, slot), kept(fresh, slot))


def act(
    model: MaskedDiffusion, state: SequenceStates, action: str, random: Any, number: int
) -> None:
    length = state.length(0)
    rows = sorted(random.sample(range(length), random.randint(1, length)))
    if action == "step":
        model.step([over(0, rows, number)], state)
    if action == "layers":
        by_layers(model, [over(0, rows, number)], state)
    if action == "branches":
        others = sorted(random.sample(range(length), random.randint(1, length)))
        branches = [over(0, rows, number), over(0, others, number + 50, branch=1)]
        (by_layers if random.random() < 0.3 else MaskedDiffusion.step)(model, branches, state)
        state.keep_branch(0, random.randint(0, 1))
    if action in ("shorter", "longer"):
        changed = (
            random.randint(3, length) if action == "shorter" else length + random.randint(1, 99)
        )
        getattr(state, "shorten" if action == "shorter" else "lengthen")(0, changed)
        if changed > length:
            model.step([over(0, range(length, changed), number)], state)
    if action == "copied":
        copy = state.snapshot(0)
        model.step([over(0, rows, number)], state)
        state.restore(0, copy)
    if action == "anew":
        state.hold(0, length)
        model.step([over(0, range(length), number)], state)


def test_what_is_kept_beside_entries_is_counted(library: ctypes.CDLL) -> None:
    model = model_of("aug")
    part = canvas_of(state := held(model, "float", 71))
    width, heads = SHAPE["head_width"], SHAPE["kv_heads"]
    sums = heads * -(-71 // GROUP) * (width * width + 1) * 4
    assert part.bytes_at(71) == part.entry_bytes(71) + sums
    assert state.bytes(0) >= part.bytes_at(71)
    assert part.missing_bytes(part.keys.shape[3]) == 0 < part.missing_bytes(10_000)


def test_a_share_of_zero_needs_no_sums(library: ctypes.CDLL) -> None:
    """As after a training that found them of no use."""
    torch.manual_seed(0)
    config = DiffusionConfig(**SHAPE | {"mask_id": MASK, "mixers": (config_of("aug"),) * 3})
    model = MaskedDiffusion(config).eval().to_inference()
    assert isinstance(model, MaskedDiffusion) and model.native is not None
    state, other = held(model, "float", 71), held(model, "float", 71)
    assert not canvas_of(state).group_sums
    step = [StepInput(0, [1, 2], overwrite=[5, 70], causal=False)]
    found, wanted = model.step(step, state).logits, by_layers(model, step, other).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
