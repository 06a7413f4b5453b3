"""Linear layers for inference: several projections of one input as one product, weights prepacked.

A step has 1…64 rows, where the stock float32 product on a CPU costs twice as much for two rows as for
one. Weights that oneDNN has reordered once cost nearly the same for 1 and for 8 rows, which is what
verification needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Kernel:
    """Which implementation was picked, and why."""

    name: str
    reason: str


def pick_kernel(weight: torch.Tensor) -> Kernel:
    """The linear kernel for weights of this dtype on this device."""
    if weight.device.type != "cpu":
        return Kernel("torch", f"{weight.device.type} device")
    if weight.dtype != torch.float32:
        return Kernel("torch", f"{weight.dtype} weights are not prepacked")
    if not torch.backends.mkldnn.is_available():
        return Kernel("torch", "this torch was built without oneDNN")
    return Kernel("onednn-packed", "float32 on a CPU: weights reordered once by oneDNN")


class PackedLinear(nn.Module):
    """x W^T + b with W in oneDNN's own order. Inference only; the plain weight is not kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )
        return out


def fuse(*linears: nn.Module) -> nn.Module:
    """One inference layer that returns the outputs of `linears` side by side."""
    plain = [layer for layer in linears if isinstance(layer, nn.Linear)]
    assert len(plain) == len(linears), "only plain linear layers can be fused"
    first = plain[0]
    weight = torch.cat([layer.weight.detach() for layer in plain])
    bias = None
    if first.bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in plain])
    if pick_kernel(weight).name == "onednn-packed":
        return PackedLinear(weight, bias)
    layer = nn.Linear(
        first.in_features, len(weight), bias=bias is not None, device="meta", dtype=weight.dtype
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
