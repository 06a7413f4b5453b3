"""Few rows times packed weights: see `triton/linear.py`."""

from __future__ import annotations

import torch

from linspec.kernels.cpu.pack import unpack_int4, unpack_int8
from linspec.kernels.gpu.plain.blocks import block_weight
from linspec.kernels.step_plan import BLOCKS, INT8, LinearPlan


def packed_linear(x: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """As the kernel, in torch, with products in the dtype of x."""
    if plan.kind == BLOCKS:
        weight = block_weight(plan)
    elif plan.kind == INT8:
        assert plan.scales is not None, "int8 weights have a scale for each channel"
        weight = unpack_int8(plan.weights, plan.scales, plan.outputs, plan.inputs)
    else:
        weight = unpack_int4(plan.weights, plan.outputs, plan.inputs)
    bias = None if plan.bias is None else plan.bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
