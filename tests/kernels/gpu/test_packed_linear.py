"""Products with packed weights against float64, and their bits for any number of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.errors import ConfigError
from linspec.kernels.cpu.pack import pack_int4, pack_int8
from linspec.kernels.gpu.plain.linear import packed_linear as plain_linear
from linspec.kernels.step_plan import F32, INT4, INT8, LinearPlan
from linspec.quantization.codes import quantize_int4, quantize_int8
from tests.kernels.gpu.trees import DEVICES, DRAWN, TOLERANCE

pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")

from linspec.kernels.gpu.triton.linear import packed_linear

KINDS = pytest.mark.parametrize("kind", [INT8, INT4])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def plan_of(kind: int, outputs: int, inputs: int, device: str, *, bias: bool = True) -> LinearPlan:
    weight = torch.randn(outputs, inputs)
    added = torch.randn(outputs, device=device) if bias else None
    if kind == INT8:
        packed, scales = pack_int8(*quantize_int8(weight))
        return LinearPlan(kind, outputs, inputs, packed.to(device), scales.to(device), added)
    packed = pack_int4(*quantize_int4(weight)).to(device)
    return LinearPlan(kind, outputs, inputs, packed, bias=added)


@KINDS
@pytest.mark.parametrize("device", DEVICES)
@settings(DRAWN, max_examples=20)
@given(
    seed=st.integers(0, 99),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 100) | st.sampled_from([512, 530, 1100]),
    rows=st.integers(1, 64),
    dtype=DTYPES,
    bias=st.booleans(),
)
def test_it_is_a_product_and_its_rows_stand_alone(
    device: str,
    kind: int,
    seed: int,
    outputs: int,
    inputs: int,
    rows: int,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    torch.manual_seed(seed)
    plan = plan_of(kind, outputs, inputs, device, bias=bias)
    x = torch.randn(rows, inputs).to(device, dtype)
    found, true = packed_linear(x, plan), plain_linear(x.double(), plan)
    size = true.abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert ((found.double() - true).abs() / size).max() < TOLERANCE[dtype]
    row = seed % rows
    assert torch.equal(packed_linear(x[row : row + 1], plan)[0], found[row])


@pytest.mark.parametrize("device", DEVICES)
def test_what_it_cannot_take_is_named(device: str) -> None:
    plan = plan_of(INT8, 3, 32, device)
    for x in (torch.zeros(65, 32), torch.zeros(1, 31), torch.zeros(32)):
        with pytest.raises(ConfigError, match="1 to 64 rows of 32 inputs"):
            packed_linear(x.to(device), plan)
    with pytest.raises(ConfigError, match="int8 or int4"):
        packed_linear(torch.zeros(1, 32, device=device), replace(plan, kind=F32))
    with pytest.raises(ConfigError, match="float16"):
        packed_linear(torch.zeros(1, 32, device=device, dtype=torch.float16), plan)
    with pytest.raises(ConfigError, match="side by side"):
        packed_linear(torch.zeros(32, 2, device=device).mT, plan)
