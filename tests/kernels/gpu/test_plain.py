"""What kernels are proved against, in torch, equals the mixers' own forms of a step in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from linspec.decoding.static_mask import StaticTreeMask
from linspec.kernels.gpu.fading import Fading
from linspec.kernels.gpu.plain.attention import tree_attention
from linspec.kernels.gpu.plain.recurrence import fold_rows, read_states
from linspec.kernels.gpu.reach import Reach
from linspec.kernels.gpu.reads import WEIGHTS
from linspec.mixers.ops.decayed import Decayed, plain_writes
from linspec.mixers.ops.delta import delta_writes
from linspec.mixers.ops.exact import (
    Exact,
    Groups,
    plain_weights,
    relu_squared,
    softmax_weights,
)
from linspec.mixers.ops.features import same, unit
from linspec.mixers.ops.summed import Summed
from tests.kernels.gpu.trees import Step, step_of

TREES = [[-1, 0, 0, 1, 1, 2, 5], [-1, 0, 1, 2, 3, 1, 4]]
HELD, WIDTH, GROUP = [11, 6], 6, 4
NEW = 5


@pytest.fixture
def step() -> Step:
    torch.manual_seed(0)
    return step_of("cpu", [2, 0], HELD, TREES, NEW)


def mask_of(step: Step, capacity: int) -> StaticTreeMask:
    return StaticTreeMask(step.tables, step.held, capacity)


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("reach", [Reach(), Reach(window=5), Reach(group=GROUP, span=2)])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("unit_keys", [False, True])
def test_attention_is_that_of_mixers(
    step: Step, reach: Reach, weights: str, unit_keys: bool
) -> None:
    q, (k, v) = random(2, 2, 3, NEW, WIDTH), random(2, 3, 2, 80, WIDTH)
    tree_mask, scale = mask_of(step, 80), 0.3 if weights == "softmax" else 1.0
    seen = tree_mask.visible[:, None, None]
    if reach.window:
        distance = tree_mask.offsets[:, :, None] - tree_mask.columns[:, None, :]
        seen = seen & (distance < reach.window)[:, None, None]
    if reach.group:
        seen, _ = Groups(reach.group, reach.span).masks(tree_mask)
    plain = {"relu2": relu_squared, "products": same}
    of = partial(plain_weights, of=plain[weights]) if weights in plain else None
    map_ = unit if unit_keys else same
    exact = Exact(of or partial(softmax_weights, scale=scale), map_, map_)
    true = exact.nodes(q, k[step.slots], v[step.slots], seen).unflatten(2, (3, NEW))
    found = tree_attention(
        *(q, k, v, step.slots, step.held, step.paths),
        scale=scale,
        weights=weights,
        unit=unit_keys,
        reach=reach,
    )
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


MAPPED = {
    "same": same,
    "unit": unit,
    "softmax": partial(torch.softmax, dim=-1),
    "relu": torch.relu,
    "elu_plus_1": lambda x: F.elu(x) + 1,
}


def part_of(fading: Fading) -> Summed | Decayed:
    """The part of a mixer that this stands for."""
    groups = Groups(fading.group or GROUP, fading.span)
    map_ = MAPPED[fading.map]
    if not fading.gates:
        return Summed(groups, map_, map_)
    return Decayed(
        groups,
        map_,
        lambda keys: map_(keys[..., :WIDTH]),
        width=WIDTH,
        decay_width=fading.gates,
        chunk=3,
        through_state=not fading.group,
        writes=delta_writes if fading.delta else plain_writes,
    )


@pytest.mark.parametrize(
    "fading",
    [
        Fading(map="unit", group=GROUP),
        Fading(map="unit", group=GROUP, span=2),
        Fading(map="relu", group=GROUP),
        Fading(map="elu_plus_1", group=GROUP),
        Fading(gates=1, delta=True, map="unit", group=GROUP, span=2),
        Fading(gates=WIDTH, map="softmax"),
        Fading(gates=WIDTH, map="softmax", group=GROUP),
        Fading(gates=1, map="unit"),
        Fading(gates=1, delta=True, map="unit"),
    ],
)
def test_states_are_those_of_mixers(step: Step, fading: Fading) -> None:
    q, v = random(2, 2, 3, NEW, WIDTH), random(3, 2, 80, 7)
    rates = torch.rand(3, 2, 80, int(fading.delta), dtype=torch.float64)
    k = torch.cat(
        (random(3, 2, 80, WIDTH), F.logsigmoid(random(3, 2, 80, fading.gates)), rates), -1
    )
    states, part, tree_mask = random(3, 2, WIDTH, 7), part_of(fading), mask_of(step, 80)
    # gates are 0 in padding
    k[:, :, :, WIDTH:] *= (torch.arange(80) < max(HELD) + len(TREES[0]))[:, None]
    _, closed = part.groups.masks(tree_mask)
    args = (tree_mask, closed, states[step.slots])
    true = part.nodes(q, k[step.slots], v[step.slots], *args).unflatten(2, (3, NEW))
    found = read_states(q, states, k, v, step.slots, step.held, step.paths, fading)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-10)

    rows = torch.arange(6).expand(2, -1)
    true = [part.fold(states[slot], k[slot, :, :6], v[slot, :, :6]) for slot in step.slots.tolist()]
    fold_rows(states, k, v, step.slots, rows, torch.tensor([6, 6]), fading)
    torch.testing.assert_close(states[step.slots], torch.stack(true), rtol=1e-9, atol=1e-10)
