"""What a step on a device has beside torch's own operations: kernels in Triton, if LINSPEC_TRITON is 'on'."""

from __future__ import annotations

from collections.abc import Callable

import torch

from linspec.errors import ConfigError
from linspec.kernels.gpu.plain.linear import packed_linear as packed_by_torch
from linspec.kernels.gpu.triton.available import SWITCH, chosen
from linspec.kernels.step_plan import LinearPlan

_DTYPES = (torch.float32, torch.bfloat16)
_WIDEST = 256
_MOST_ROWS = 64


def tree_attention_for(
    device: torch.device, dtype: torch.dtype, head_width: int
) -> Callable[..., torch.Tensor] | None:
    """Attention of token trees in Triton, for models of this dtype and width of heads; None unless chosen.

    Raises ConfigError where it is and cannot be had.
    """
    if not chosen(device):
        return None
    if dtype not in _DTYPES or head_width > _WIDEST:
        raise ConfigError(
            f"Triton's attention takes float32 or bfloat16 and heads of at most {_WIDEST} features; this "
            f"model has {dtype} and {head_width}: use {SWITCH}=off, or LLM(dtype=...)"
        )
    from linspec.kernels.gpu.triton.attention import tree_attention

    return tree_attention


def device_linear(rows: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """rows [M, K] times int8 or int4 weights on their device: [M, N], in the dtype of the rows.

    Rows keep their precision, where the CPU's kernels round them to 8 bits.
    """
    if rows.dtype not in _DTYPES or not chosen(rows.device):
        return packed_by_torch(rows, plan)
    from linspec.kernels.gpu.triton.linear import packed_linear

    # in pieces, since another way to multiply would round in another way
    return torch.cat([packed_linear(piece, plan) for piece in rows.split(_MOST_ROWS)])
