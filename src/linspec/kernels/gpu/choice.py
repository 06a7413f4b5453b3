"""Which kernels a step on a device can have."""

from __future__ import annotations

from collections.abc import Callable

import torch

from linspec.kernels.gpu.triton.available import available

_DTYPES = (torch.float32, torch.bfloat16)
_WIDTHS = range(16, 257)


def tree_attention_for(
    device: torch.device, dtype: torch.dtype, head_width: int
) -> Callable[..., torch.Tensor] | None:
    """Attention of token trees in Triton for models of this dtype and width of heads; None without it."""
    if dtype not in _DTYPES or head_width not in _WIDTHS or not available(device):
        return None
    from linspec.kernels.gpu.triton.attention import tree_attention

    return tree_attention
