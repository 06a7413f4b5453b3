"""The kernels of linear states against float64 and the mixers' forms, and their bits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.tree import shape_of
from linspec.errors import ConfigError
from linspec.kernels.gpu.fading import Fading
from linspec.kernels.gpu.plain import recurrence as plain
from tests.kernels.gpu.trees import DEVICES, DRAWN, TOLERANCE, Step, step_of

pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")

from linspec.kernels.gpu.triton.recurrence import fold_rows, read_states

WIDTH = 24
FADINGS = [
    Fading(map="unit"),
    Fading(map="unit", group=4, span=2),
    Fading(gates=WIDTH, map="softmax"),
    Fading(map="elu_plus_1", group=4),
    Fading(map="relu"),
    Fading(gates=1, map="unit", group=4),
    Fading(gates=1, delta=True, map="unit", group=4, span=2),
    Fading(gates=1, delta=True, map="unit"),
]


@dataclass(frozen=True)
class Case:
    """A step of random trees over random states."""

    seed: int
    heads: int
    repeats: int
    columns: int
    dtype: torch.dtype
    held: list[int]
    parents: list[list[int]]
    new: int
    fading: Fading

    def inputs(
        self, device: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Step]:
        """Queries, states, keys with gates, values, and the step."""
        torch.manual_seed(self.seed)
        count, capacity = len(self.held), max(self.held) + 64
        q = torch.randn(count, self.heads, self.repeats, self.new, WIDTH)
        states = torch.randn(count + 1, self.heads, WIDTH, self.columns)
        keys = torch.randn(count + 1, self.heads, capacity, WIDTH)
        values = torch.randn(count + 1, self.heads, capacity, self.columns)
        gates = F.logsigmoid(torch.randn(*keys.shape[:3], self.fading.gates)) / 4
        rates = torch.rand(*keys.shape[:3], int(self.fading.delta))
        slots = torch.randperm(count + 1)[:count].tolist()
        step = step_of(device, slots, self.held, self.parents, self.new)
        keys = torch.cat((keys, gates, rates), -1)
        small = (rows.to(device, self.dtype) for rows in (q, keys, values))
        q, keys, values = small
        return q, states.to(device), keys, values, step


@st.composite
def cases(draw: st.DrawFn) -> Case:
    slots = draw(st.integers(1, 2))
    staged = draw(st.integers(1, 8))
    trees = [[draw(st.integers(-1, i - 1)) for i in range(staged)] for _ in range(slots)]
    return Case(
        seed=draw(st.integers(0, 99)),
        heads=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 3)),
        columns=draw(st.sampled_from([16, 40])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        held=[draw(st.integers(0, 9)) for _ in range(slots)],
        parents=trees,
        new=draw(st.integers(1, staged)),
        fading=draw(st.sampled_from(FADINGS)),
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(DRAWN, max_examples=10)
@given(case=cases())
def test_states_are_read_as_the_equations_say(device: str, case: Case) -> None:
    q, states, keys, values, step = case.inputs(device)
    args = (keys, values, step.slots, step.held, step.paths, case.fading)
    found = read_states(q, states, *args)
    true = plain.read_states(q.double(), states.double(), *args)
    size = true.abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert ((found.double() - true).abs() / size).max() < TOLERANCE[case.dtype]


@pytest.mark.parametrize("device", DEVICES)
@settings(DRAWN, max_examples=6)
@given(case=cases())
def test_nodes_have_the_bits_of_single_steps(device: str, case: Case) -> None:
    """A node alone, behind a path that is folded into the state or committed, reads the same."""
    q, states, keys, values, step = case.inputs(device)
    found = read_states(q, states, keys, values, step.slots, step.held, step.paths, case.fading)
    for r, (slot, held) in enumerate(zip(step.slots.tolist(), case.held, strict=True)):
        path = shape_of(case.parents[r]).path_to(len(case.parents[r]) - 1)
        rows = [*range(held), *(held + node for node in path)]
        at = torch.tensor(rows, device=device)
        mine = [each[slot : slot + 1, :, at].contiguous() for each in (keys, values)]
        state, own = states[slot : slot + 1].clone(), len(rows) - 1
        if not case.fading.group:
            some = own // 2
            first = torch.arange(own, device=device)[None]
            zero, counts = torch.zeros(2, 1, dtype=torch.long, device=device)
            fold_rows(state, *mine, zero, first, counts + some, case.fading)
            mine, own = [each[:, :, some:].contiguous() for each in mine], own - some
        one = step_of(device, [0], [own], [[-1]], 1)
        query = q[r : r + 1, :, :, -1:].contiguous()
        args = (one.slots, one.held, one.paths, case.fading)
        single = read_states(query, state, *mine, *args)
        assert torch.equal(single[0, :, :, 0], found[r, :, :, -1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fading", [each for each in FADINGS if not each.group])
def test_accepted_rows_fold_as_the_equations_say(device: str, fading: Fading) -> None:
    case = Case(3, 2, 1, 40, torch.float32, [5, 3], [[-1, 0, 0, 1]] * 2, 1, fading)
    _, states, keys, values, step = case.inputs(device)
    rows = step.held[:, None] + torch.tensor([[0, 1, 3], [0, 2, 0]], device=device)
    counts = torch.tensor([3, 2], device=device)
    true = states.double()
    plain.fold_rows(true, keys, values, step.slots, rows, counts, fading)
    fold_rows(states, keys, values, step.slots, rows, counts, fading)
    torch.testing.assert_close(states, true.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_what_they_cannot_take_is_named(device: str) -> None:
    case = Case(0, 1, 1, 16, torch.float32, [0], [[-1]], 1, Fading())
    q, states, keys, values, step = case.inputs(device)
    args = (step.slots, step.held, step.paths)
    with pytest.raises(ConfigError, match="float32"):
        read_states(q, states.bfloat16(), keys, values, *args, Fading())
    with pytest.raises(ConfigError, match="25 columns"):
        read_states(q, states, keys, values, *args, Fading(gates=1))
    with pytest.raises(ConfigError, match="side by side"):
        read_states(q, states, keys, values.mT.contiguous().mT, *args, Fading())
    with pytest.raises(ConfigError, match="softmax"):
        Fading(map="softmx")
