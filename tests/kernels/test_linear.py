"""Tiles against exact references, rows against each other, instruction sets against each other."""

from __future__ import annotations

import ctypes

import pytest
import torch

from linspec.kernels.cpu import pack
from linspec.kernels.cpu.library import instruction_sets
from linspec.kernels.cpu.linear import linear
from linspec.kernels.step_plan import BF16, F32, INT4, INT8
from linspec.models.linear import Quantizer
from linspec.models.native_linear import NativeLinear
from linspec.quantization.codes import quantize_int4, quantize_int8

KINDS = {"f32": F32, "bf16": BF16, "int8": INT8, "int4": INT4}
# below, at and above a tile, a group and a vector
SHAPES = [(1, 1), (31, 33), (32, 32), (40, 96), (65, 130), (96, 257)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: str, outputs: int, inputs: int, *, bias: bool = False) -> NativeLinear:
    weight = random(outputs, inputs, seed=outputs)
    extra = random(outputs, seed=1) if bias else None
    if kind == "int8":
        return NativeLinear(INT8, outputs, inputs, *pack.pack_int8(*quantize_int8(weight)), extra)
    if kind == "int4":
        packed = pack.pack_int4(*quantize_int4(weight))
        return NativeLinear(INT4, outputs, inputs, packed, None, extra)
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    return NativeLinear(
        KINDS[kind], outputs, inputs, pack.pack_floats(weight.to(dtype)), None, extra
    )


def reference(made: NativeLinear, x: torch.Tensor) -> torch.Tensor:
    """The product in float64, of codes where the kernel takes codes."""
    weight = made.weight.double()
    if made.kind in (INT8, INT4):
        scale = x.abs().amax(1, keepdim=True) / 127
        codes = (x * (127 / x.abs().amax(1, keepdim=True))).round()
        x = codes.double() * scale.double()
    y = x.double() @ weight.T
    return y if made.bias is None else y + made.bias.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_match_float64(isa: str, kind: str, outputs: int, inputs: int) -> None:
    made = layer(kind, outputs, inputs, bias=True)
    for rows in (1, 2, 3, 7, 8, 9, 16, 17):
        x = random(rows, inputs, seed=rows)
        expected = reference(made, x)
        torch.testing.assert_close(made(x).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_meet(isa: str, kind: str) -> None:
    """Verification is exact because k rows in one call are k calls, bit for bit."""
    made = layer(kind, 70, 130)
    x = random(17, 130) * torch.logspace(-3, 3, 17)[:, None]
    alone = torch.cat([made(row[None]) for row in x])
    for rows in range(1, 18):
        assert torch.equal(made(x[:rows]), alone[:rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_all_instruction_sets_agree_to_the_bit(
    library: ctypes.CDLL, kind: str, outputs: int, inputs: int
) -> None:
    made, x = layer(kind, outputs, inputs, bias=True), random(17, inputs)
    before = library.ls_isa()
    results = []
    for name in instruction_sets(library):
        assert library.ls_use_isa(name.encode())
        results.append(torch.cat([made(x[:rows]) for rows in range(1, 18)]))
    assert library.ls_use_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_codes_do_not_overflow(isa: str, sign: int) -> None:
    """Products of the largest codes: what AVX2's 16-bit sums cannot hold when done carelessly."""
    inputs = 4096
    x = torch.full((3, inputs), 127.0)
    for lowest, expected in ((-128, -128), (127, 127)):
        codes = torch.full((32, inputs), lowest, dtype=torch.int8)
        packed, scales = pack.pack_int8(codes, torch.ones(32))
        y = NativeLinear(INT8, 32, inputs, packed, scales)(sign * x)
        assert torch.equal(y, torch.full((3, 32), float(sign * expected * 127 * inputs)))
    for code in (-8, 7):
        codes = torch.full((32, inputs), code, dtype=torch.int8)
        scales = torch.ones(32, inputs // 32, dtype=torch.bfloat16)
        y = NativeLinear(INT4, 32, inputs, pack.pack_int4(codes, scales))(sign * x)
        assert torch.equal(y, torch.full((3, 32), float(sign * code * 127 * inputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(library: ctypes.CDLL, kind: str) -> None:
    made, x = layer(kind, 200, 96), random(70, 96)
    results = [linear(library, made.struct(), x, threads) for threads in (1, 2, 3, 1, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_zeros_and_of_nan(isa: str, kind: str) -> None:
    """A NaN must not become a number by quantization; zeros have no scale."""
    made, x = layer(kind, 40, 64), random(3, 64)
    x[0] = 0
    x[1, 63] = float("nan")
    y = made(x)
    assert torch.equal(y[0], torch.zeros(40))
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


def test_packing_is_undone(library: ctypes.CDLL) -> None:
    weight = random(45, 70)
    codes, scales = quantize_int4(weight)
    plain = codes.float() * scales.float().repeat_interleave(32, 1)[:, :70]
    assert torch.equal(pack.unpack_int4(pack.pack_int4(codes, scales), 45, 70), plain)
    eight, factors = quantize_int8(weight)
    unpacked = pack.unpack_int8(*pack.pack_int8(eight, factors), 45, 70)
    assert torch.equal(unpacked, eight.float() * factors[:, None])
    assert torch.equal(pack.unpack_floats(pack.pack_floats(weight), 45), weight)


def test_without_the_library_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from linspec.kernels.cpu.library import Found
    from linspec.models import native_linear as module

    x = random(5, 96)
    layers = [layer(kind, 40, 96, bias=True) for kind in KINDS]
    monkeypatch.setattr(module, "load", lambda: Found(None, "torch", "not built"))
    for made in layers:
        torch.testing.assert_close(made(x).double(), reference(made, x), rtol=1e-4, atol=1e-4)


def test_importance_protects_the_inputs_that_matter() -> None:
    weight = random(64, 96)
    importance = torch.ones(96)
    importance[::8] = 1000.0
    error = []
    for given in (None, importance):
        codes, scales = quantize_int4(weight, given)
        rest = codes.float() * scales.float().repeat_interleave(32, 1) - weight
        error.append(float((rest.square() * importance).sum()))
    assert error[1] < 0.6 * error[0]


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="8 or 4 bits, got 3"):
        Quantizer(3, {})
