"""Linear layers for inference: several projections of one input as one product, weights prepacked.

A step has 1…64 rows, where the stock float32 product on a CPU costs twice as much for two rows as for
one. Weights packed for linspec's own kernels, or reordered once by oneDNN where these are missing,
cost nearly the same for 1 and for 8 rows, which is what verification needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from linspec.kernels.cpu import pack
from linspec.kernels.selector import pick_kernel
from linspec.kernels.step_plan import F32, INT4, INT8
from linspec.models.native_linear import NativeLinear
from linspec.quantization.codes import check_bits, quantize_int4, quantize_int8

_KINDS = {8: INT8, 4: INT4}


class PackedLinear(nn.Module):
    """x W^T + b with W in oneDNN's own order. Inference only; the plain weight is made when asked for."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The plain weights [outputs, inputs], for what knows a model by them."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )
        return out


def fused_linear(*linears: nn.Module) -> nn.Module:
    """One inference layer that returns the outputs of `linears` side by side, in their precision."""
    weight, bias = joined(linears)
    kernel = pick_kernel(weight)
    if kernel.own:
        return NativeLinear(F32, *_sizes(weight), pack.pack_floats(weight), None, bias)
    if kernel.name == "onednn-packed":
        return PackedLinear(weight, bias)
    return _plain(weight, bias)


def plain_linear(*linears: nn.Module) -> nn.Module:
    """As `fused_linear` for a model that goes to a device: without weights in an order of the CPU's own."""
    return _plain(*joined(linears))


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(
        weight.shape[1], len(weight), bias=bias is not None, device="meta", dtype=weight.dtype
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def joined(linears: tuple[nn.Module, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of layers with the same input, one below the other."""
    plain = [layer for layer in linears if isinstance(layer, nn.Linear)]
    assert len(plain) == len(linears), "only plain linear layers can be fused"
    weight = torch.cat([layer.weight.detach() for layer in plain])
    bias = None
    if plain[0].bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in plain])
    return weight, bias


def _sizes(weight: torch.Tensor) -> tuple[int, int]:
    """Outputs and inputs."""
    return weight.shape[0], weight.shape[1]


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A `LinearFactory` that makes integer layers.

    bits: 8 or 4, for the weights; activations have 8. calibration: second moments of the inputs of a
    layer (the first, where several are fused), for the search of int4 scales.
    """

    bits: int
    calibration: Mapping[nn.Module, torch.Tensor]

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def __call__(self, *linears: nn.Module) -> nn.Module:
        weight, bias = joined(linears)
        bias = None if bias is None else bias.float()
        if self.bits == 8:
            parts = pack.pack_int8(*quantize_int8(weight))
            return NativeLinear(INT8, *_sizes(weight), *parts, bias)
        packed = pack.pack_int4(*quantize_int4(weight, self.calibration.get(linears[0])))
        return NativeLinear(INT4, *_sizes(weight), packed, None, bias)


@dataclass(frozen=True, slots=True)
class Blank:
    """A `LinearFactory` that makes layers without memory, for quantized weights that are loaded later."""

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def __call__(self, *linears: nn.Module) -> nn.Module:
        plain = [layer for layer in linears if isinstance(layer, nn.Linear)]
        outputs, bias = sum(layer.out_features for layer in plain), plain[0].bias is not None
        return NativeLinear.empty(_KINDS[self.bits], outputs, plain[0].in_features, bias)


def integer_bits(layer: nn.Module) -> int | None:
    """Bits of the weights of a quantized layer, None for any other."""
    kind = layer.kind if isinstance(layer, NativeLinear) else None
    return next((bits for bits, known in _KINDS.items() if known == kind), None)
