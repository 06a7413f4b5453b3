"""The attention kernel against float64, and its bits against those of other steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.tree import shape_of
from linspec.errors import ConfigError
from linspec.kernels.gpu.plain.attention import tree_attention as plain_attention
from linspec.kernels.gpu.reach import Reach
from linspec.kernels.gpu.reads import WEIGHTS
from tests.kernels.gpu.trees import DEVICES, DRAWN, TOLERANCE, Step, step_of

pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")

from linspec.kernels.gpu.triton.attention import PART, tree_attention

BORDERS = [0, 1, 62, 63, 64, 65, PART - 2, PART - 1, PART, PART + 1, 2 * PART]


@dataclass(frozen=True)
class Case:
    """A step of random trees with what it reads."""

    seed: int
    heads: int
    repeats: int
    width: int
    dtype: torch.dtype
    held: list[int]
    parents: list[list[int]]
    new: int
    reach: Reach
    cap: float
    weights: str
    bases: list[int] | None
    unit: bool = False
    kept: torch.dtype | None = None
    sinks: int = 0

    def inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Step]:
        """Queries, keys, values, and the step; slots in an order of their own."""
        torch.manual_seed(self.seed)
        count, capacity = len(self.held), max(self.held) + 64
        q = torch.randn(count, self.heads, self.repeats, self.new, self.width)
        k, v = torch.randn(2, count + 1, self.heads, capacity, self.width)
        slots = torch.randperm(count + 1)[:count].tolist()
        step = step_of(device, slots, self.held, self.parents, self.new)
        # what no node may see
        for slot, rows, tree in zip(slots, self.held, self.parents, strict=True):
            k[slot, :, rows + len(tree) :] = torch.nan
            v[slot, :, rows + len(tree) :] = torch.nan
        k, v = (rows.to(device, self.kept or self.dtype) for rows in (k, v))
        return q.to(device, self.dtype), k, v, step

    def settings(self, device: str) -> dict[str, Any]:
        bases = None if self.bases is None else torch.tensor(self.bases, device=device)
        given = {"scale": self.width**-0.5, "cap": self.cap, "weights": self.weights}
        return {**given, "unit": self.unit, "reach": self.reach, "bases": bases}

    def with_sinks(self, device: str) -> dict[str, Any]:
        """`settings`, and what is kept of the first rows."""
        if not self.sinks:
            return self.settings(device)
        shape = len(self.held) + 1, self.heads, 2, self.sinks, self.width
        torch.manual_seed(self.seed + 1)
        kept = torch.randn(shape).to(device, self.kept or self.dtype)
        return {**self.settings(device), "sinks": self.sinks, "kept": kept}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    slots = draw(st.integers(1, 2))
    staged = draw(st.integers(1, 12))
    trees = [[draw(st.integers(-1, i - 1)) for i in range(staged)] for _ in range(slots)]
    reach = draw(
        st.sampled_from([Reach(), Reach(window=5), Reach(window=100), Reach(group=8, span=2)])
    )
    bases = draw(
        st.none() | st.lists(st.sampled_from([0, 8, 72, 256]), min_size=slots, max_size=slots)
    )
    weights, unit, sinks = draw(st.sampled_from(WEIGHTS)), draw(st.booleans()), 0
    if reach.group and bases is not None and draw(st.booleans()):
        weights, unit, sinks = "softmax", False, 3
    return Case(
        seed=draw(st.integers(0, 99)),
        heads=draw(st.integers(1, 2)),
        repeats=draw(st.sampled_from([1, 2, 3, 17])),
        width=draw(st.sampled_from([4, 64, 80])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        held=[draw(st.sampled_from(BORDERS) | st.integers(0, 300)) for _ in range(slots)],
        parents=trees,
        new=draw(st.integers(1, staged)),
        reach=reach,
        cap=draw(st.sampled_from([0.0, 3.0])),
        weights=weights,
        bases=bases,
        unit=unit,
        sinks=sinks,
        kept=draw(st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32])),
    )


def _run(case: Case, device: str) -> torch.Tensor:
    q, k, v, step = case.inputs(device)
    return tree_attention(q, k, v, step.slots, step.held, step.paths, **case.with_sinks(device))


@pytest.mark.parametrize("device", DEVICES)
@settings(DRAWN, max_examples=10)
@given(case=cases())
def test_it_is_attention(device: str, case: Case) -> None:
    q, k, v, step = case.inputs(device)
    found = _run(case, device)
    clean = [rows.nan_to_num().double() for rows in (k, v)]
    args = (step.slots, step.held, step.paths)
    true = plain_attention(q.double(), *clean, *args, **case.with_sinks(device))
    size = true.abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert ((found.double() - true).abs() / size).max() < TOLERANCE[case.dtype]


@pytest.mark.parametrize("device", DEVICES)
@settings(DRAWN, max_examples=6)
@given(case=cases())
def test_nodes_have_the_bits_of_single_steps(device: str, case: Case) -> None:
    """A node alone in its batch, behind a path that is committed, gets the same."""
    q, k, v, step = case.inputs(device)
    found = _run(case, device)
    for r, (slot, held, parents) in enumerate(
        zip(step.slots.tolist(), case.held, case.parents, strict=True)
    ):
        node = case.new - 1
        path = list(shape_of(parents).path_to(len(parents) - 1))
        alone = [rows[slot : slot + 1].clone() for rows in (k, v)]
        for rows in alone:
            rows[:, :, held : held + len(path)] = rows[:, :, [held + each for each in path]]
            rows[:, :, held + len(path) :] = torch.nan
        one = step_of(device, [0], [held + len(path) - 1], [[-1]], 1)
        given = case.with_sinks(device)
        if case.bases is not None:
            given["bases"] = given["bases"][r : r + 1]
        if case.sinks:
            given["kept"] = given["kept"][slot : slot + 1]
        query = q[r : r + 1, :, :, node : node + 1].contiguous()
        single = tree_attention(query, *alone, one.slots, one.held, one.paths, **given)
        assert torch.equal(single[0, :, :, 0], found[r, :, :, node])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bases", [[0, 0], [8, 256]])
def test_sinks_are_seen_from_everywhere(device: str, bases: list[int]) -> None:
    """From their rows or from where they are kept."""
    case = Case(
        4, 2, 2, 20, torch.float32, [9, 41], [[-1, 0, 0, 1]] * 2, 4, Reach(group=8), 0.0, "softmax",
        bases, sinks=3,
    )  # fmt: skip
    q, k, v, step = case.inputs(device)
    found = _run(case, device)
    clean = [rows.nan_to_num().double() for rows in (k, v)]
    args = (q.double(), *clean, step.slots, step.held, step.paths)
    true, without = (
        plain_attention(*args, **each) for each in (case.with_sinks(device), case.settings(device))
    )
    assert (found.double() - true).abs().max() < TOLERANCE[torch.float32]
    assert (without - true).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_sixty_four_nodes_have_the_bits_of_fewer(device: str) -> None:
    tree = [-1, *(node // 2 for node in range(63))]
    case = Case(1, 1, 3, 64, torch.bfloat16, [130], [tree], 64, Reach(), 0.0, "softmax", None)
    q, k, v, step = case.inputs(device)
    found = _run(case, device)
    few = step_of(device, step.slots.tolist(), [130], [tree], 7)
    last = q[:, :, :, -7:].contiguous()
    again = tree_attention(last, k, v, few.slots, few.held, few.paths, scale=64**-0.5)
    assert torch.equal(again, found[:, :, :, -7:])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_leave_change_no_bits(device: str) -> None:
    case = Case(
        2, 2, 2, 64, torch.float32, [200], [[-1, 0, 0]], 3, Reach(window=40), 0.0, "softmax", None
    )
    q, k, v, step = case.inputs(device)
    found = _run(case, device)
    later = step_of(device, step.slots.tolist(), [200 - 136], [[-1, 0, 0]], 3)
    rest = [rows[:, :, 136:].contiguous() for rows in (k, v)]
    given = {**case.settings(device), "bases": torch.tensor([136], device=device)}
    assert torch.equal(
        tree_attention(q, *rest, later.slots, later.held, later.paths, **given), found
    )


@pytest.mark.parametrize("device", DEVICES)
def test_what_it_cannot_take_is_named(device: str) -> None:
    step = step_of(device, [0], [0], [[-1]], 1)
    q, k = torch.zeros(1, 1, 1, 1, 257, device=device), torch.zeros(1, 1, 64, 257, device=device)
    with pytest.raises(ConfigError, match="at most 256 features"):
        tree_attention(q, k, k, step.slots, step.held, step.paths, scale=1.0)
    q, k = torch.zeros(1, 1, 1, 1, 16, device=device), torch.zeros(1, 1, 64, 16, device=device)
    with pytest.raises(ConfigError, match=r"queries in float32 or bfloat16.*float16"):
        tree_attention(q.half(), k, k, step.slots, step.held, step.paths, scale=1.0)
    with pytest.raises(ConfigError, match="weights must be one of"):
        tree_attention(q, k, k, step.slots, step.held, step.paths, scale=1.0, weights="relu")
    sinks = {"sinks": 2, "scale": 1.0, "reach": Reach(group=4)}
    with pytest.raises(ConfigError, match="of length 1"):
        tree_attention(q, k, k, step.slots, step.held, step.paths, unit=True, **sinks)
    with pytest.raises(ConfigError, match=r"takes sinks \[slots, 1, 2, 2, 16\]"):
        tree_attention(q, k, k, step.slots, step.held, step.paths, **sinks)
    with pytest.raises(ConfigError, match="side by side"):
        tree_attention(q, k.mT.contiguous().mT, k, step.slots, step.held, step.paths, scale=1.0)
