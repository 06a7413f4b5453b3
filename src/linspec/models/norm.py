"""Root-mean-square normalization for inference: the same formula in fewer operators."""

from __future__ import annotations

import torch
from torch import nn

from linspec.mixers.norms import OffsetRMSNorm


class InferenceRMSNorm(nn.Module):
    """x · w / sqrt(mean(x²) + ε) (Zhang & Sennrich 2019), for the few rows of a step on a CPU.

    There torch's own composite takes about three times as long as these four operators.
    """

    factors: torch.Tensor
    scaled: torch.Tensor
    floor: torch.Tensor

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        assert isinstance(norm.eps, float), "a decoder's norms have their own epsilon"
        width = norm.weight.shape[0]
        # as it is saved
        self.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
        factors = norm.weight.detach()
        if isinstance(norm, OffsetRMSNorm):
            factors = 1 + factors
        # sqrt(mean(x²) + ε) = hypot(‖x‖, sqrt(ε D)) / sqrt(D)
        floor = norm.weight.new_tensor((norm.eps * width) ** 0.5)
        # buffers, because a model may go to a device once it has its inference form
        made = {"factors": factors, "scaled": factors * width**0.5, "floor": floor}
        for name, tensor in made.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * self.scaled / torch.hypot(size, self.floor)


def inference_norm(norm: nn.Module) -> nn.Module:
    """The inference form of a norm; norms that gain nothing are returned as they are."""
    if not isinstance(norm, nn.RMSNorm) or norm.weight.dtype not in (torch.float32, torch.float64):
        return norm
    return InferenceRMSNorm(norm) if norm.weight.device.type == "cpu" else norm
