"""Few rows times weights in the blocks of a GGUF file as they lie in tiles, in Triton.

A program has one tile of output channels, sixteen rows and one part of the inputs (see `few_rows.py`). It
takes these by sixteen, in order: codes less their offset, which floats of 16 bits hold exactly, then their
scale. So a row's bits do not depend on how many there are, and no weight is rounded. Sums are float32.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import triton
import triton.language as tl

from linspec.errors import ConfigError
from linspec.kernels.gpu.block_forms import FORMS, LEVELS, BlockForm
from linspec.kernels.gpu.triton.arithmetic import UNFUSED, interpreted, product
from linspec.kernels.gpu.triton.available import require
from linspec.kernels.gpu.triton.few_rows import PART, ROWS, by_parts, check_rows, store_sums
from linspec.kernels.step_plan import BLOCKS, LinearPlan
from linspec.quantization.blocks import BY_NUMBER, TILE


# one program for every number of rows
@triton.jit(do_not_specialize=["rows"])
def _blocks(
    x, codes, halves, levels, bias, out, rows, inputs, outputs, x_r, out_p, out_r,
    ROWS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr,
    MINIMA: tl.constexpr, SHARE: tl.constexpr, BY_SIXTEEN: tl.constexpr, HEADER: tl.constexpr,
    FACTORS: tl.constexpr, HIGH: tl.constexpr, GROUP_BYTES: tl.constexpr,
    TOGETHER: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sixteen rows times one tile. levels: what codes stand for, None where they are numbers."""
    tile, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel, step = tl.arange(0, TILE), tl.arange(0, 16)
    groups = inputs // 32
    # input 4 q + i of sixteen: bytes of a channel lie in fours
    quad, within = step // 4, (step % 4)[:, None] + channel * 4
    sums = tl.zeros((ROWS, TILE), tl.float32)
    begin = tl.program_id(2) * (PART // 32)
    for group in range(begin, tl.minimum(begin + PART // 32, groups)):
        head = (tile.to(tl.int64) * (groups // SHARE) + group // SHARE) * TOGETHER
        at = codes + head + HEADER + group % SHARE * GROUP_BYTES
        scale = tl.load(halves + head // 2 + channel).to(tl.float32)
        if MINIMA:
            minimum = tl.load(halves + head // 2 + TILE + channel).to(tl.float32)
        if FACTORS > 0 and not BY_SIXTEEN:
            scale = scale * tl.load(at + channel).to(tl.float32)
            minimum = -minimum * tl.load(at + TILE + channel).to(tl.float32)
        bits = at + FACTORS
        low = bits + HIGH + within + (quad * (TILE * 4))[:, None]
        for half in tl.static_range(2):
            if BITS == 8:
                code = tl.load(low + half * 4 * (TILE * 4)).to(tl.int32)
            else:
                code = (tl.load(low).to(tl.int32) >> (4 * half)) & 15
            if BITS == 5:
                upper = tl.load(bits + within).to(tl.int32)
                code = code | ((upper >> (4 * half + quad)[:, None]) & 1) << 4
            if BITS == 6:
                upper = tl.load(bits + half * (TILE * 4) + within).to(tl.int32)
                code = code | ((upper >> (2 * quad)[:, None]) & 3) << 4
            if levels is not None:
                code = tl.load(levels + code).to(tl.int32)
            a = tl.load(
                x + row[:, None].to(tl.int64) * x_r + group * 32 + half * 16 + step,
                mask=(row < rows)[:, None], other=0.0,
            )  # fmt: skip
            found = product(a, (code - OFFSET).to(tl.float32).to(a.dtype), WIDE)
            if BY_SIXTEEN:
                factor = tl.load(at + half * TILE + channel).to(tl.int32)
                factor = tl.where(factor > 127, factor - 256, factor).to(tl.float32)
                sums += found * (scale * factor)
            else:
                sums += found * scale
            if MINIMA:
                sums += tl.sum(a.to(tl.float32), 1)[:, None] * minimum
    to = tile * TILE + channel
    store_sums(out, bias, sums, tl.program_id(2), row, to, rows, outputs, out_p, out_r)


def block_linear(x: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """x Wᵀ + b: x [M, K] of 1 to 64 rows, float32 or bfloat16 -> [M, N], in the dtype of x.

    The plan's weights are of kind BLOCKS, on the device of x. Raises ConfigError for another kind, more rows,
    other widths or dtypes, and where Triton cannot run.
    """
    require(x.device)
    if plan.kind != BLOCKS:
        raise ConfigError(f"block_linear takes weights in blocks, got kind {plan.kind}")
    check_rows(x, plan)
    return by_parts(x, plan, partial(_multiply, x, plan))


def _multiply(
    x: torch.Tensor, plan: LinearPlan, out: torch.Tensor, bias: torch.Tensor | None, parts: int
) -> None:
    """See `by_parts`: the matrices of a plan side by side."""
    first = at = 0
    for number, outputs in plan.parts:
        kind = BY_NUMBER[number]
        size = kind.bytes_of(outputs, plan.inputs)
        codes, mine = plan.weights[at : at + size], out[:, :, first : first + outputs]
        levels = _levels(x.device) if FORMS[kind.name].levels else None
        _blocks[(triton.cdiv(outputs, TILE), triton.cdiv(len(x), ROWS), parts)](
            *(x, codes, codes.view(torch.float16), levels),
            *(None if bias is None else bias[first:], mine),
            *(len(x), plan.inputs, outputs, x.stride(0), *out.stride()[:2]),
            **sizes(FORMS[kind.name]),
            ROWS=ROWS,
            PART=PART,
            WIDE=interpreted(),
            **UNFUSED,
        )
        first, at = first + outputs, at + size


def sizes(form: BlockForm) -> dict[str, int]:
    """What a program knows of a format when it is compiled."""
    return {
        "TILE": TILE,
        "BITS": form.bits,
        "OFFSET": form.offset,
        "MINIMA": form.minima,
        "SHARE": form.share,
        "BY_SIXTEEN": form.by_sixteen,
        "HEADER": form.header,
        "FACTORS": form.factors,
        "HIGH": form.high,
        "GROUP_BYTES": form.group,
        "TOGETHER": form.together,
    }


@cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS, dtype=torch.uint8, device=device)
