"""What products of few rows share: rows that are taken, and inputs in parts that join in order.

A layer has few tiles of outputs for the processors of a device, so its inputs are divided too, into parts of
one size, whatever the rows. Each part gives float32 sums, and these join in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from linspec.errors import ConfigError
from linspec.kernels.gpu.triton.arithmetic import UNFUSED
from linspec.kernels.step_plan import LinearPlan

# rows of a product, and the most that are taken
ROWS, MOST_ROWS = 16, 64
# inputs of a part: whole groups of every format
PART = 256
_BLOCK = 1024


@triton.jit
def store_sums(
    out, bias, sums, part, row, to, rows, outputs, out_p, out_r,
):  # fmt: skip
    """Sums [ROWS, TILE] of a part, with the bias where there is one."""
    if bias is not None:
        sums += tl.load(bias + to, mask=to < outputs, other=0.0).to(tl.float32)
    known = (row < rows)[:, None] & (to < outputs)
    place = out + part.to(tl.int64) * out_p + row[:, None].to(tl.int64) * out_r + to
    tl.store(place, sums.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["size"])
def _join(sums, bias, out, size, outputs, parts, BLOCK: tl.constexpr):
    """Sums of all parts, one after the other, and the bias."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < size
    total = tl.load(sums + at, mask=known, other=0.0)
    for part in range(1, parts):
        total += tl.load(sums + part * size.to(tl.int64) + at, mask=known, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % outputs, mask=known, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=known)


def by_parts(
    x: torch.Tensor,
    plan: LinearPlan,
    multiply: Callable[[torch.Tensor, torch.Tensor | None, int], None],
) -> torch.Tensor:
    """x Wᵀ + b: `multiply` writes what each of so many parts gives, [parts, M, N], with a bias or without."""
    parts, out = triton.cdiv(plan.inputs, PART), x.new_empty(len(x), plan.outputs)
    if parts == 1:
        multiply(out[None], plan.bias, 1)
        return out
    sums = x.new_empty((parts, *out.shape), dtype=torch.float32)
    multiply(sums, None, parts)
    size = out.numel()
    _join[(triton.cdiv(size, _BLOCK),)](
        *(sums, plan.bias, out, size, plan.outputs, parts), BLOCK=_BLOCK, **UNFUSED
    )
    return out


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
