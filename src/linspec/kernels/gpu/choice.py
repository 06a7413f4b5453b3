"""Which kernels a step on a device has: those in Triton where they run, else torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from linspec.kernels.gpu.plain.linear import packed_linear as packed_by_torch
from linspec.kernels.gpu.triton.available import available
from linspec.kernels.step_plan import LinearPlan

_DTYPES = (torch.float32, torch.bfloat16)
_WIDTHS = range(16, 257)
_MOST_ROWS = 64
# asked in every product
_runs = lru_cache(available)


def tree_attention_for(
    device: torch.device, dtype: torch.dtype, head_width: int
) -> Callable[..., torch.Tensor] | None:
    """Attention of token trees in Triton for models of this dtype and width of heads; None without it."""
    if dtype not in _DTYPES or head_width not in _WIDTHS or not _runs(device):
        return None
    from linspec.kernels.gpu.triton.attention import tree_attention

    return tree_attention


def device_linear(rows: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """rows [M, K] times int8 or int4 weights on their device: [M, N], in the dtype of the rows.

    Rows keep their precision, where the CPU's kernels round them to 8 bits.
    """
    if len(rows) > _MOST_ROWS or rows.dtype not in _DTYPES or not _runs(rows.device):
        return packed_by_torch(rows, plan)
    from linspec.kernels.gpu.triton.linear import packed_linear

    return packed_linear(rows, plan)
