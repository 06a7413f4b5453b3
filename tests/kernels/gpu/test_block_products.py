"""Products with the blocks of GGUF files against float64, and their bits for any number of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.errors import ConfigError
from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.linear import plain_weight
from linspec.kernels.gpu.choice import device_linear
from linspec.kernels.gpu.plain.blocks import block_outputs, block_weight
from linspec.kernels.gpu.triton.available import SWITCH
from linspec.kernels.step_plan import F32, LinearPlan
from linspec.quantization.blocks import BLOCK_FORMATS
from tests.kernels.gpu.random_blocks import plan_of
from tests.kernels.gpu.trees import DEVICES, DRAWN, TOLERANCE

FORMATS = pytest.mark.parametrize("name", BLOCK_FORMATS)
pytestmark = pytest.mark.skipif(
    load().library is None, reason="blocks are put into tiles by the compiled library"
)


@FORMATS
def test_torch_makes_the_floats_that_the_library_makes(name: str) -> None:
    torch.manual_seed(0)
    plan = plan_of([(name, 45)], 512)
    found = block_weight(plan)
    assert torch.equal(found, plain_weight(plan))
    outputs = torch.tensor([44, 3, 31, 32, 3])
    assert torch.equal(block_outputs(plan, outputs), found[outputs])


@FORMATS
@pytest.mark.parametrize("device", DEVICES)
@settings(DRAWN, max_examples=4)
@given(
    seed=st.integers(0, 99),
    outputs=st.integers(1, 70),
    inputs=st.sampled_from([256, 512, 768]),
    rows=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_it_is_a_product_and_its_rows_stand_alone(
    device: str,
    name: str,
    seed: int,
    outputs: int,
    inputs: int,
    rows: int,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    blocks = pytest.importorskip("linspec.kernels.gpu.triton.blocks")
    torch.manual_seed(seed)
    plan = plan_of([(name, outputs)], inputs, device, bias=bias)
    x = torch.randn(rows, inputs).to(device, dtype)
    found = blocks.block_linear(x, plan)
    given = None if plan.bias is None else plan.bias.double()
    true = torch.nn.functional.linear(x.double(), block_weight(plan).double(), given)
    size = true.abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert ((found.double() - true).abs() / size).max() < TOLERANCE[dtype]
    row = seed % rows
    assert torch.equal(blocks.block_linear(x[row : row + 1], plan)[0], found[row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [3, 65])
def test_matrices_of_several_formats_are_one_product(
    device: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows by the kernel, many by the floats that the blocks stand for."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")
    monkeypatch.setenv(SWITCH, "on")
    torch.manual_seed(1)
    plan = plan_of([("Q4_K", 32), ("Q6_K", 64), ("Q8_0", 7)], 256, device, bias=True)
    x = torch.randn(rows, 256, device=device)
    true = x.double() @ block_weight(plan).double().T + plan.bias.double()
    torch.testing.assert_close(device_linear(x, plan).double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_what_it_cannot_take_is_named(device: str) -> None:
    blocks = pytest.importorskip("linspec.kernels.gpu.triton.blocks")
    plan = plan_of([("Q4_0", 3)], 32, device)
    for x in (torch.zeros(65, 32), torch.zeros(1, 31), torch.zeros(32)):
        with pytest.raises(ConfigError, match="1 to 64 rows of 32 inputs"):
            blocks.block_linear(x.to(device), plan)
    x, other = torch.zeros(1, 32, device=device), LinearPlan(F32, 3, 32, plan.weights)
    with pytest.raises(ConfigError, match="in blocks, got kind 0"):
        blocks.block_linear(x, other)
