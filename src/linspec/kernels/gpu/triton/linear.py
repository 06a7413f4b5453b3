"""Few rows times int8 or int4 weights as `kernels/cpu/pack.py` has them, in Triton.

A program has one tile of output channels and sixteen rows, and takes the inputs in blocks of one size, in
order. So a row's bits do not depend on how many there are. Rows keep their dtype, in which codes are exact,
and sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from linspec.errors import ConfigError
from linspec.kernels.gpu.triton.arithmetic import UNFUSED, interpreted, product
from linspec.kernels.gpu.triton.available import require
from linspec.kernels.step_plan import INT4, INT8, LinearPlan

# rows of a product, and the most that are taken
ROWS, MOST_ROWS = 16, 64
# output channels of a tile, inputs that share a scale, bytes of these in int4: see `pack_int4`
_TILE, _GROUP, _LINE = 32, 32, 576


# one program for every number of rows
@triton.jit(do_not_specialize=["rows"])
def _int8(
    x, codes, scales, bias, out, rows, inputs, outputs, x_r,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sixteen rows times one tile [K' / 4, 32, 4] of codes, each in a byte with its top bit turned."""
    tile, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel, step = tl.arange(0, TILE), tl.arange(0, STEP)
    padded = (inputs + TILE - 1) // TILE * TILE
    lines = codes + tile.to(tl.int64) * padded * TILE
    sums = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(0, inputs, STEP):
        at = first + step
        a = tl.load(
            x + row[:, None].to(tl.int64) * x_r + at,
            mask=(row < rows)[:, None] & (at < inputs), other=0.0,
        )  # fmt: skip
        byte = tl.load(
            lines + (at // 4 * (TILE * 4) + at % 4)[:, None] + channel * 4,
            mask=(at < padded)[:, None], other=128,
        )  # fmt: skip
        sums += product(a, (byte.to(tl.float32) - 128.0).to(a.dtype), WIDE)
    to = tile * TILE + channel
    sums = sums * tl.load(scales + to)
    if bias is not None:
        sums += tl.load(bias + to, mask=to < outputs, other=0.0).to(tl.float32)
    known = (row < rows)[:, None] & (to < outputs)
    tl.store(out + row[:, None] * outputs + to, sums.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["rows"])
def _int4(
    x, codes, scales, bias, out, rows, inputs, outputs, x_r,
    ROWS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, LINE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sixteen rows times one tile of groups: 32 scales in bfloat16, then [4, 32, 4] bytes of two codes."""
    tile, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel, step = tl.arange(0, TILE), tl.arange(0, GROUP)
    groups = (inputs + GROUP - 1) // GROUP
    # the second half of a group is in the upper bits
    half = step % (GROUP // 2)
    within = (2 * TILE + half // 4 * (TILE * 4) + half % 4)[:, None] + channel * 4
    shift = (step // (GROUP // 2) * 4)[:, None]
    sums = tl.zeros((ROWS, TILE), tl.float32)
    for group in range(0, groups):
        at, line = group * GROUP + step, (tile.to(tl.int64) * groups + group) * LINE
        a = tl.load(
            x + row[:, None].to(tl.int64) * x_r + at,
            mask=(row < rows)[:, None] & (at < inputs), other=0.0,
        )  # fmt: skip
        byte = tl.load(codes + line + within).to(tl.int32)
        weight = ((byte >> shift) & 15).to(tl.float32) - 8.0
        scale = tl.load(scales + line // 2 + channel).to(tl.float32)
        sums += product(a, weight.to(a.dtype), WIDE) * scale
    to = tile * TILE + channel
    if bias is not None:
        sums += tl.load(bias + to, mask=to < outputs, other=0.0).to(tl.float32)
    known = (row < rows)[:, None] & (to < outputs)
    tl.store(out + row[:, None] * outputs + to, sums.to(out.dtype.element_ty), mask=known)


def packed_linear(x: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """x Wᵀ + b: x [M, K] of 1 to 64 rows, float32 or bfloat16 -> [M, N], in the dtype of x.

    The plan's weights are of kind INT8 or INT4, on the device of x. Raises ConfigError for another kind, more
    rows, other widths or dtypes, and where Triton cannot run.
    """
    require(x.device)
    _check(x, plan)
    out = x.new_empty(len(x), plan.outputs)
    grid = (triton.cdiv(plan.outputs, _TILE), triton.cdiv(len(x), ROWS))
    sizes = (plan.bias, out, len(x), plan.inputs, plan.outputs, x.stride(0))
    common = {"ROWS": ROWS, "TILE": _TILE, "WIDE": interpreted(), **UNFUSED}
    if plan.kind == INT8:
        _int8[grid](x, plan.weights, plan.scales, *sizes, **common, STEP=2 * _GROUP)
    else:
        # the same memory, as what its scales are
        scales = plan.weights.view(torch.bfloat16)
        _int4[grid](x, plan.weights, scales, *sizes, **common, GROUP=_GROUP, LINE=_LINE)
    return out


def _check(x: torch.Tensor, plan: LinearPlan) -> None:
    if plan.kind not in (INT8, INT4):
        raise ConfigError(f"packed_linear takes weights in int8 or int4, got kind {plan.kind}")
    check_rows(x, plan)


def check_rows(x: torch.Tensor, plan: LinearPlan) -> None:
    """Raises ConfigError for rows that the kernels do not multiply."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"Triton's products take rows in float32 or bfloat16, got {x.dtype}")
    if x.ndim != 2 or not 1 <= len(x) <= MOST_ROWS or x.shape[1] != plan.inputs:
        raise ConfigError(
            f"Triton's products take 1 to {MOST_ROWS} rows of {plan.inputs} inputs, got {list(x.shape)}"
        )
    if x.stride(1) != 1:
        raise ConfigError(
            "Triton's products take rows whose inputs lie side by side; use contiguous()"
        )
