"""Which implementation multiplies by the weights of a linear layer, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.kernels.cpu.library import load


@dataclass(frozen=True, slots=True)
class Kernel:
    """Which implementation was picked, and why; own: linspec's."""

    name: str
    reason: str
    own: bool = False


def pick_kernel(weight: torch.Tensor) -> Kernel:
    """The linear kernel for weights of this dtype on this device."""
    if weight.device.type != "cpu":
        return Kernel("torch", f"{weight.device.type} device")
    if weight.dtype != torch.float32:
        return Kernel("torch", f"{weight.dtype} weights are not prepacked")
    found = load()
    if found.library is not None:
        return Kernel(f"linspec-{found.name}", found.reason, own=True)
    if not torch.backends.mkldnn.is_available():
        return Kernel("torch", "this torch was built without oneDNN")
    return Kernel("onednn-packed", f"weights reordered once by oneDNN, as {found.reason}")
