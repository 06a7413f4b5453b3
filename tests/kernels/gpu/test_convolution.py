"""The convolution over values of token trees against float64, the mixers' form, and its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.static_mask import StaticTreeMask
from linspec.decoding.tree import shape_of
from linspec.errors import ConfigError
from linspec.kernels.gpu.plain.convolution import convolve_paths as plain
from linspec.mixers.ops.convolution import convolve_nodes, pad_taps
from tests.kernels.gpu.trees import DEVICES, DRAWN, TOLERANCE, step_of

TREE = [-1, 0, 0, 1, 3, 4]
FEATURES = 20


def test_it_is_that_of_mixers() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 2, 4 + 80, FEATURES, dtype=torch.float64)
    padded = pad_taps(torch.randn(6, 5, dtype=torch.float64), 2)
    step = step_of("cpu", [2, 0], [9, 0], [TREE, TREE], 4)
    tree_mask = StaticTreeMask(step.tables, step.held, 80)
    true = convolve_nodes(values[step.slots], tree_mask, padded, 4, final=True)
    given = step.slots, step.held, step.paths, 4, torch.float64
    torch.testing.assert_close(plain(values, padded[..., :-1], *given), true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@settings(DRAWN, max_examples=10)
@given(
    seed=st.integers(0, 99),
    held=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    new=st.integers(1, len(TREE)),
    taps=st.sampled_from([1, 2, 7, 32]),
    repeats=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_a_convolution_and_its_nodes_stand_alone(
    device: str,
    seed: int,
    held: list[int],
    new: int,
    taps: int,
    repeats: int,
    dtype: torch.dtype,
) -> None:
    kernel = pytest.importorskip("linspec.kernels.gpu.triton.convolution").convolve_paths
    torch.manual_seed(seed)
    values = torch.randn(4, 2, taps + max(held) + 64, FEATURES).to(device, dtype)
    weights = torch.randn(2, repeats, taps, device=device)
    slots = torch.randperm(4)[: len(held)].tolist()
    step = step_of(device, slots, held, [TREE] * len(held), new)
    for slot, rows in zip(slots, held, strict=True):
        values[slot, :, taps + rows + len(TREE) :] = torch.nan
    given = step.slots, step.held, step.paths, taps, dtype
    found, true = (
        kernel(values, weights, *given),
        plain(values, weights, *given[:-1], torch.float64),
    )
    size = true.abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert ((found.double() - true).abs() / size).max() < TOLERANCE[dtype]

    path = torch.tensor(shape_of(TREE).path_to(len(TREE) - 1), device=device)
    for r, (slot, rows) in enumerate(zip(slots, held, strict=True)):
        alone, first = values[slot : slot + 1].clone(), taps + rows
        alone[:, :, first : first + len(path)] = alone[:, :, first + path]
        one = step_of(device, [0], [rows + len(path) - 1], [[-1]], 1)
        single = kernel(alone, weights, one.slots, one.held, one.paths, taps, dtype)
        assert torch.equal(single[0, :, :, 0], found[r, :, :, -1])


@pytest.mark.parametrize("device", DEVICES)
def test_what_it_cannot_take_is_named(device: str) -> None:
    kernel = pytest.importorskip("linspec.kernels.gpu.triton.convolution").convolve_paths
    step = step_of(device, [0], [0], [[-1]], 1)
    values = torch.zeros(1, 1, FEATURES, 64, device=device).mT
    taps = torch.zeros(1, 1, 2, device=device)
    with pytest.raises(ConfigError, match="side by side"):
        kernel(values, taps, step.slots, step.held, step.paths, 1, torch.float32)
