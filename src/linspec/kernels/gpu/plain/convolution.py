"""The causal convolution over values of the nodes of token trees: see `triton/convolution.py`."""

from __future__ import annotations

import torch

from linspec.decoding.tree_paths import STAGED, TreePaths


def convolve_paths(
    values: torch.Tensor,
    taps: torch.Tensor,
    slots: torch.Tensor,
    held: torch.Tensor,
    paths: TreePaths,
    history: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As the kernel, in torch, with sums in `dtype`."""
    back = paths.depths[..., None] - torch.arange(taps.shape[2], device=held.device)
    staged = paths.nodes.gather(2, back.clamp(0, STAGED - 1))
    lies = history + held[:, None, None] + torch.where(back >= 0, staged, back)  # [R, N, W]
    found = values[slots[:, None, None], :, lies].to(dtype)  # [R, N, W, Hkv, V]
    return torch.einsum("rnwgv,gbw->rgbnv", found, taps.to(dtype))
