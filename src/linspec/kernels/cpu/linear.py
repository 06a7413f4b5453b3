"""Linear layers on the C kernels: float32, bfloat16, W8A8 and W4A8 weights, any number of rows.

Rows never meet: a row gets the same bits whether it comes alone or with others, so verification of a
token tree decides exactly as plain decoding would. Integer layers quantise each row of activations to
int8 with a scale of its own.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from linspec.errors import StateError
from linspec.kernels.cpu import library as native
from linspec.kernels.cpu import pack
from linspec.kernels.cpu.library import BF16, F32, INT4, INT8, load
from linspec.kernels.cpu.threads import native_threads

_DTYPES = {F32: torch.float32, BF16: torch.bfloat16, INT8: torch.uint8, INT4: torch.uint8}


class NativeLinear(nn.Module):
    """x W^T + b with packed weights; inference only.

    `packed` and `scales` are as `pack` makes them for `kind`. Without the compiled library the product
    is computed by torch from the unpacked weights.
    """

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
    ) -> None:
        super().__init__()
        self.kind, self.out_features, self.in_features = kind, outputs, inputs
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self._struct: native.LinearStruct | None = None
        self._plain: torch.Tensor | None = None

    @classmethod
    def empty(cls, kind: int, outputs: int, inputs: int, bias: bool) -> NativeLinear:
        """A layer without memory (device meta), for weights that are loaded later."""
        shape, scales = pack.packed_shapes(kind, outputs, inputs)
        return cls(
            kind,
            outputs,
            inputs,
            torch.empty(shape, dtype=_DTYPES[kind], device="meta"),
            None if scales is None else torch.empty(scales, device="meta"),
            torch.empty(outputs, device="meta") if bias else None,
        )

    @property
    def weight(self) -> torch.Tensor:
        """The float32 weights [outputs, inputs] that the packed ones stand for; a new tensor."""
        packed = cast(torch.Tensor, self.packed)
        if self.kind == INT8:
            assert self.scales is not None
            return pack.unpack_int8(packed, self.scales, self.out_features, self.in_features)
        if self.kind == INT4:
            return pack.unpack_int4(packed, self.out_features, self.in_features)
        return pack.unpack_floats(packed, self.out_features).float()

    def struct(self) -> native.LinearStruct:
        """What the C side needs to know; valid as long as this layer's tensors stay."""
        packed = cast(torch.Tensor, self.packed)
        # weights that are loaded later replace the first ones
        if self._struct is None or self._struct.weights != packed.data_ptr():
            self._check()
            self._struct = pack.struct(
                self.kind,
                packed,
                self.scales,
                outputs=self.out_features,
                inputs=self.in_features,
                bias=self.bias,
            )
        return self._struct

    def _check(self) -> None:
        """Raise StateError unless all tensors are what the C side takes them for."""
        shape, scales = pack.packed_shapes(self.kind, self.out_features, self.in_features)
        wanted = (
            ("packed", shape, _DTYPES[self.kind]),
            ("scales", scales, torch.float32),
            ("bias", (self.out_features,), torch.float32),
        )
        for name, sizes, dtype in wanted:
            tensor = getattr(self, name)
            if tensor is None and (name == "bias" or sizes is None):
                continue
            if (
                tensor is None
                or (tuple(tensor.shape), tensor.dtype) != (sizes, dtype)
                or not tensor.is_contiguous()
            ):
                found = None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise StateError(
                    f"{name} of a layer of {self.out_features} outputs is {found}, its kernel takes "
                    f"contiguous {dtype} {sizes}; load or quantise the model again"
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        library = load().library
        rows = x.reshape(-1, self.in_features)
        if library is None:
            return self._by_torch(rows).view(*x.shape[:-1], self.out_features)
        rows = rows.float()
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = native.linear(library, self.struct(), rows, native_threads())
        return y.view(*x.shape[:-1], self.out_features)

    def _by_torch(self, rows: torch.Tensor) -> torch.Tensor:
        if self._plain is None:
            self._plain = self.weight
        if self.kind in (F32, BF16):
            return F.linear(rows, self._plain, self.bias)
        scale = rows.abs().amax(1, keepdim=True) / 127
        codes = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
        y = (codes @ self._plain.T) * scale
        return y if self.bias is None else y + self.bias
