"""Few rows times int8 or int4 weights as `kernels/cpu/pack.py` has them, in Triton.

A program has one tile of output channels, sixteen rows and one part of the inputs (see `few_rows.py`). It
takes these in blocks of one size, in order. So a row's bits do not depend on how many there are. Rows keep
their dtype, in which codes are exact, and sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from linspec.errors import ConfigError
from linspec.kernels.gpu.triton.arithmetic import UNFUSED, interpreted, product
from linspec.kernels.gpu.triton.available import require
from linspec.kernels.gpu.triton.few_rows import PART, ROWS, by_parts, check_rows, store_sums
from linspec.kernels.step_plan import INT4, INT8, LinearPlan

# output channels of a tile, inputs that share a scale, bytes of these in int4: see `pack_int4`
_TILE, _GROUP, _LINE = 32, 32, 576


# one program for every number of rows
@triton.jit(do_not_specialize=["rows"])
def _int8(
    x, codes, scales, bias, out, rows, inputs, outputs, x_r, out_p, out_r,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sixteen rows times one tile [K' / 4, 32, 4] of codes, each in a byte with its top bit turned."""
    tile, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel, step = tl.arange(0, TILE), tl.arange(0, STEP)
    padded = (inputs + TILE - 1) // TILE * TILE
    lines = codes + tile.to(tl.int64) * padded * TILE
    sums = tl.zeros((ROWS, TILE), tl.float32)
    begin = tl.program_id(2) * PART
    for first in range(begin, tl.minimum(begin + PART, inputs), STEP):
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
    store_sums(out, bias, sums, tl.program_id(2), row, to, rows, outputs, out_p, out_r)


@triton.jit(do_not_specialize=["rows"])
def _int4(
    x, codes, scales, bias, out, rows, inputs, outputs, x_r, out_p, out_r,
    ROWS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, LINE: tl.constexpr,
    PART: tl.constexpr, WIDE: tl.constexpr,
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
    begin = tl.program_id(2) * (PART // GROUP)
    for group in range(begin, tl.minimum(begin + PART // GROUP, groups)):
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
    store_sums(out, bias, sums, tl.program_id(2), row, to, rows, outputs, out_p, out_r)


def packed_linear(x: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """x Wᵀ + b: x [M, K] of 1 to 64 rows, float32 or bfloat16 -> [M, N], in the dtype of x.

    The plan's weights are of kind INT8 or INT4, on the device of x. Raises ConfigError for another kind, more
    rows, other widths or dtypes, and where Triton cannot run.
    """
    require(x.device)
    _check(x, plan)
    common = {"ROWS": ROWS, "TILE": _TILE, "PART": PART, "WIDE": interpreted(), **UNFUSED}

    def multiply(out: torch.Tensor, bias: torch.Tensor | None, parts: int) -> None:
        grid = (triton.cdiv(plan.outputs, _TILE), triton.cdiv(len(x), ROWS), parts)
        sizes = (bias, out, len(x), plan.inputs, plan.outputs, x.stride(0), *out.stride()[:2])
        if plan.kind == INT8:
            _int8[grid](x, plan.weights, plan.scales, *sizes, **common, STEP=2 * _GROUP)
            return
        # the same memory, as what its scales are
        scales = plan.weights.view(torch.bfloat16)
        _int4[grid](x, plan.weights, scales, *sizes, **common, GROUP=_GROUP, LINE=_LINE)

    return by_parts(x, plan, multiply)


def _check(x: torch.Tensor, plan: LinearPlan) -> None:
    if plan.kind not in (INT8, INT4):
        raise ConfigError(f"packed_linear takes weights in int8 or int4, got kind {plan.kind}")
    check_rows(x, plan)
