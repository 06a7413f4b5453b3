"""What a step on a device has beside torch's own operations: kernels in Triton, if LINSPEC_TRITON is 'on'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from linspec.errors import ConfigError
from linspec.kernels.gpu.plain import attention as attention_by_torch
from linspec.kernels.gpu.plain import convolution as values_by_torch
from linspec.kernels.gpu.plain import recurrence as states_by_torch
from linspec.kernels.gpu.plain.linear import packed_linear as packed_by_torch
from linspec.kernels.gpu.triton.available import SWITCH, chosen
from linspec.kernels.step_plan import BLOCKS, LinearPlan

_DTYPES = (torch.float32, torch.bfloat16)
_WIDEST = 256
_MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """Functions that a step of static shape reads by, and that fold what it has committed: those of
    `kernels/gpu/triton` or of `kernels/gpu/plain`."""

    name: str
    tree_attention: Callable[..., torch.Tensor]
    read_states: Callable[..., torch.Tensor]
    fold_rows: Callable[..., None]
    convolve_paths: Callable[..., torch.Tensor]


# what the kernels are proved against, in any dtype
PLAIN = DeviceKernels(
    "torch",
    attention_by_torch.tree_attention,
    states_by_torch.read_states,
    states_by_torch.fold_rows,
    values_by_torch.convolve_paths,
)


def kernels_for(device: torch.device, dtype: torch.dtype, head_width: int) -> DeviceKernels | None:
    """The kernels in Triton for models of this dtype and width of heads; None unless chosen.

    Raises ConfigError where they are and cannot be had.
    """
    if not chosen(device):
        return None
    # values may have a column of ones behind them
    if dtype not in _DTYPES or head_width > _WIDEST:
        raise ConfigError(
            f"Triton's kernels take float32 or bfloat16 and heads of at most {_WIDEST} features; this "
            f"model has {dtype} and {head_width}: use {SWITCH}=off, or LLM(dtype=...)"
        )
    from linspec.kernels.gpu.triton import attention, convolution, recurrence

    return DeviceKernels(
        "triton",
        attention.tree_attention,
        recurrence.read_states,
        recurrence.fold_rows,
        convolution.convolve_paths,
    )


def multiplies_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights can stay in the blocks of a file, for a model that computes in `dtype` on a device.

    On a CPU in float32; elsewhere where Triton's kernels were chosen, in float32 or bfloat16.
    """
    if device.type == "cpu":
        return dtype == torch.float32
    return dtype in _DTYPES and chosen(device)


def device_linear(rows: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """rows [M, K] times integer weights or blocks on their device: [M, N], in the dtype of the rows.

    Rows keep their precision, where the CPU's kernels round them to 8 bits. Many rows are multiplied by the
    floats that blocks stand for.
    """
    if rows.dtype not in _DTYPES or not chosen(rows.device):
        return packed_by_torch(rows, plan)
    if plan.kind == BLOCKS:
        if len(rows) > _MOST_ROWS:
            return packed_by_torch(rows, plan)
        from linspec.kernels.gpu.triton.blocks import block_linear

        return block_linear(rows, plan)
    from linspec.kernels.gpu.triton.linear import packed_linear

    # in pieces, since another way to multiply would round in another way
    return torch.cat([packed_linear(piece, plan) for piece in rows.split(_MOST_ROWS)])
