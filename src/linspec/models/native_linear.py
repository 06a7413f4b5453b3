"""A linear layer of packed weights; what multiplies by them are kernels of the CPU or of a device."""

from __future__ import annotations

import torch
from torch import nn

from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.linear import (
    linear,
    linear_by_torch,
    linear_struct,
    plain_weight,
    weight_rows,
    without_weights,
)
from linspec.kernels.cpu.structs import LinearStruct
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.gpu.choice import device_linear
from linspec.kernels.step_plan import BF16, F32, LinearPlan
from linspec.quantization.blocks import BY_NUMBER


class NativeLinear(nn.Module):
    """x Wᵀ + b with packed weights; inference only.

    `packed` and `scales` are as `pack` makes them for `kind`; `parts` are those of a `LinearPlan`. Without
    the compiled library the product is computed by torch from the unpacked weights. On another device than
    the CPU weights are int8, int4 or blocks: see `kernels/gpu/choice.py`.
    """

    packed: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        kind: int,
        outputs: int,
        inputs: int,
        packed: torch.Tensor,
        scales: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        parts: tuple[tuple[int, int], ...] = (),
    ) -> None:
        super().__init__()
        self.kind, self.out_features, self.in_features = kind, outputs, inputs
        self.parts = parts
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self._struct: LinearStruct | None = None
        self._at = 0
        self._plain: torch.Tensor | None = None

    @classmethod
    def empty(cls, kind: int, outputs: int, inputs: int, bias: bool) -> NativeLinear:
        """A layer without memory (device meta), for weights that are loaded later."""
        plan = without_weights(kind, outputs, inputs, bias)
        return cls(kind, outputs, inputs, plan.weights, plan.scales, plan.bias)

    def plan(self) -> LinearPlan:
        """This layer as kernels see it."""
        sizes = self.kind, self.out_features, self.in_features
        return LinearPlan(*sizes, self.packed, self.scales, self.bias, self.parts)

    @property
    def weight(self) -> torch.Tensor:
        """The float32 weights [outputs, inputs] that the packed ones stand for; a new tensor."""
        return plain_weight(self.plan())

    def rows(self, places: torch.Tensor) -> torch.Tensor:
        """Of `weight`, the rows [N] at `places`: [N, inputs]."""
        return weight_rows(self.plan(), places)

    @property
    def formats(self) -> str:
        """The formats of the file's blocks, where these are kept."""
        return "+".join(BY_NUMBER[number].name for number, _ in self.parts)

    def struct(self) -> LinearStruct:
        """What the C side needs to know; valid as long as this layer's tensors stay."""
        # weights that are loaded later replace the first ones
        if self._struct is None or self._at != self.packed.data_ptr():
            self._struct, self._at = linear_struct(self.plan()), self.packed.data_ptr()
        return self._struct

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.device.type != "cpu":
            return device_linear(rows.contiguous(), self.plan()).view(*x.shape[:-1], -1)
        library = load().library
        if library is None:
            if self._plain is None:
                self._plain = self.weight
            y = linear_by_torch(self.kind, self._plain, self.bias, rows)
            return y.view(*x.shape[:-1], self.out_features)
        rows = rows.float()
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = linear(library, self.struct(), rows, native_threads())
        return y.view(*x.shape[:-1], self.out_features)


def rounds_inputs(model: object) -> bool:
    """Whether a model has layers that round their inputs to 8 bits: those of integer weights or blocks."""
    layers = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(each, NativeLinear) and each.kind not in (F32, BF16) for each in layers)
