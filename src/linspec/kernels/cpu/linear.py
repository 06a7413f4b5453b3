"""Linear layers on the C kernels: float32, bfloat16, W8A8 and W4A8 weights, any number of rows.

Rows are independent: a row gets the same bits whether it comes alone or with others, so verification
of a token tree decides exactly as plain decoding would. Integer layers quantize each row of
activations to int8 with a scale of its own.
"""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch
import torch.nn.functional as F

from linspec.errors import StateError
from linspec.kernels.cpu import pack
from linspec.kernels.cpu.blocks import block_rows, bytes_of_parts, part_structs
from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.structs import LinearStruct
from linspec.kernels.gpu.plain.blocks import block_weight
from linspec.kernels.step_plan import BF16, BLOCKS, F32, INT4, INT8, LinearPlan
from linspec.quantization.codes import GROUP

_DTYPES = {
    F32: torch.float32,
    BF16: torch.bfloat16,
    INT8: torch.uint8,
    INT4: torch.uint8,
    BLOCKS: torch.uint8,
}


def without_weights(kind: int, outputs: int, inputs: int, bias: bool) -> LinearPlan:
    """A layer without memory (device meta), for weights that are loaded later."""
    shape, scales = pack.packed_shapes(kind, outputs, inputs)
    return LinearPlan(
        kind,
        outputs,
        inputs,
        torch.empty(shape, dtype=_DTYPES[kind], device="meta"),
        None if scales is None else torch.empty(scales, device="meta"),
        torch.empty(outputs, device="meta") if bias else None,
    )


def linear_struct(plan: LinearPlan) -> LinearStruct:
    """What the C side is told; the tensors must outlive it. Raises StateError if they are not as it
    takes them for."""
    _check(plan)
    parts = part_structs(plan)
    return LinearStruct(
        kind=plan.kind,
        inputs=plan.inputs,
        outputs=plan.outputs,
        padded=pack.up(plan.inputs, GROUP),
        weights=None if plan.parts else plan.weights.data_ptr(),
        scales=None if plan.scales is None else plan.scales.data_ptr(),
        bias=None if plan.bias is None else plan.bias.data_ptr(),
        parts=len(parts),
        part=parts,
    )


def _check(plan: LinearPlan) -> None:
    shape, scales = pack.packed_shapes(plan.kind, plan.outputs, plan.inputs)
    if plan.kind == BLOCKS:
        shape = (bytes_of_parts(plan),)
    wanted = (
        ("weights", plan.weights, shape, _DTYPES[plan.kind]),
        ("scales", plan.scales, scales, torch.float32),
        ("bias", plan.bias, (plan.outputs,), torch.float32),
    )
    for name, tensor, sizes, dtype in wanted:
        if tensor is None and (name == "bias" or sizes is None):
            continue
        if (
            tensor is None
            or (tuple(tensor.shape), tensor.dtype) != (sizes, dtype)
            or not tensor.is_contiguous()
        ):
            found = None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise StateError(
                f"{name} of a layer of {plan.outputs} outputs is {found}, its kernel takes "
                f"contiguous {dtype} {sizes}; load or quantize the model again"
            )


def linear(
    library: ctypes.CDLL, struct: LinearStruct, x: torch.Tensor, threads: int
) -> torch.Tensor:
    """x [M, inputs] float32 with contiguous rows times the weights of `struct`: [M, outputs]."""
    rows = x.shape[0]
    y = torch.empty(rows, struct.outputs)
    space = torch.empty(library.ls_linear_workspace(byref(struct), rows), dtype=torch.uint8)
    library.ls_linear_forward(
        byref(struct),
        *(x.data_ptr(), x.stride(0), rows),
        *(y.data_ptr(), struct.outputs),
        *(space.data_ptr(), threads),
    )
    return y


def plain_weight(plan: LinearPlan) -> torch.Tensor:
    """The float32 weights [outputs, inputs] that the packed ones stand for; a new tensor."""
    if plan.kind == INT8:
        assert plan.scales is not None
        return pack.unpack_int8(plan.weights, plan.scales, plan.outputs, plan.inputs)
    if plan.kind == INT4:
        return pack.unpack_int4(plan.weights, plan.outputs, plan.inputs)
    if plan.kind == BLOCKS and plan.weights.device.type != "cpu":
        return block_weight(plan)
    if plan.kind == BLOCKS:
        return weight_rows(plan, torch.arange(plan.outputs))
    return pack.unpack_floats(plan.weights, plan.outputs).float()


def weight_rows(plan: LinearPlan, rows: torch.Tensor) -> torch.Tensor:
    """Some rows [N] of `plain_weight`, without unpacking all where that can be: [N, inputs]."""
    if plan.kind == BLOCKS and plan.weights.device.type == "cpu":
        library = load().library
        assert library is not None, "blocks are kept only where the library is"
        return block_rows(library, plan, rows)
    if plan.kind in (F32, BF16):
        return pack.float_rows(plan.weights, rows).float()
    return plain_weight(plan)[rows]


def linear_by_torch(
    kind: int, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """What `linear` gives, without the library: x [M, inputs] by what `plain_weight` made."""
    if kind in (F32, BF16):
        return F.linear(x, weight, bias)
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    y = (codes @ weight.T) * scale
    return y if bias is None else y + bias
