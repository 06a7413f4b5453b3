"""Weights in blocks of GGUF files: the values that the package gguf reads, on every instruction set."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from linspec.errors import StateError
from linspec.kernels.cpu.blocks import block_rows, pack_blocks
from linspec.kernels.cpu.library import instruction_sets
from linspec.kernels.cpu.linear import linear
from linspec.kernels.step_plan import BLOCKS, LinearPlan
from linspec.models.block_embedding import BlockEmbedding
from linspec.models.native_linear import NativeLinear
from linspec.quantization.blocks import BLOCK_FORMATS, BlockFormat

FORMATS = list(BLOCK_FORMATS.values())
# 16-bit floats: zero, the smallest, a large subnormal one, ordinary ones, the largest, with both signs
HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x1C00, 0x2E66, 0xA123, 0x3C00, 0x7BFF, 0xFBFF)
ORDINARY = (0x1C00, 0x9E66, 0x2123, 0xA0F0)
every_format = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)


def blocks(
    kind: BlockFormat,
    outputs: int,
    inputs: int,
    *,
    seed: int = 0,
    byte: int | None = None,
    halves: tuple[int, ...] = ORDINARY,
) -> torch.Tensor:
    """The bytes of a tensor: any bytes, or all alike, with scales of `halves`."""
    draw = np.random.default_rng(seed)
    count = outputs * inputs // kind.inputs
    raw = draw.integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    if byte is not None:
        raw[:] = byte
    chosen = draw.choice(np.array(halves, "<u2"), (count, len(kind.halves) // 2))
    raw[:, list(kind.halves)] = chosen.view(np.uint8)
    return torch.from_numpy(raw.reshape(-1))


def values(kind: BlockFormat, raw: torch.Tensor, outputs: int) -> torch.Tensor:
    """What the package gguf reads."""
    rows = raw.numpy().reshape(outputs, -1)
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType(kind.number)).copy())


def layer(
    library: ctypes.CDLL, kind: BlockFormat, raw: torch.Tensor, outputs: int, inputs: int
) -> NativeLinear:
    tiles = torch.empty(kind.bytes_of(outputs, inputs), dtype=torch.uint8)
    assert pack_blocks(library, kind, raw, torch.arange(outputs), inputs, tiles)
    return NativeLinear(BLOCKS, outputs, inputs, tiles, parts=((kind.number, outputs),))


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Inputs as the kernels see them: 8-bit codes with a scale for every 32."""
    groups = x.unflatten(1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(most > 0, 127 / most, 0)).round()
    return (codes.double() * (most / 127).double()).flatten(1)


def sizes(kind: BlockFormat) -> list[tuple[int, int]]:
    """Few and odd numbers of outputs and blocks."""
    counts = (1, 3) if kind.inputs == 256 else (1, 3, 8, 17)
    return [(outputs, count * kind.inputs) for outputs in (1, 32, 70) for count in counts]


@every_format
@pytest.mark.parametrize("halves", [ORDINARY, HALVES], ids=["ordinary", "extreme"])
def test_every_value_is_that_of_the_file(
    library: ctypes.CDLL, kind: BlockFormat, halves: tuple[int, ...]
) -> None:
    for seed, (outputs, inputs) in enumerate(sizes(kind)):
        raw = blocks(kind, outputs, inputs, seed=seed, halves=halves)
        found = layer(library, kind, raw, outputs, inputs).weight
        assert torch.equal(found, values(kind, raw, outputs))


@every_format
def test_each_code_has_its_place(library: ctypes.CDLL, kind: BlockFormat) -> None:
    """One bit at a time: an input that took the code of another would show."""
    bits = [each for each in range(8 * kind.bytes) if each // 8 not in kind.halves]
    raw = np.zeros((len(bits), kind.bytes), np.uint8)
    for row, bit in enumerate(bits):
        raw[row, bit // 8] = 1 << bit % 8
    raw[:, list(kind.halves)] = np.tile(
        np.array([0x3C00], "<u2").view(np.uint8), len(kind.halves) // 2
    )
    if kind.inputs == 256:
        # factors of 1, or no code would count
        factors = range(192, 208) if kind.name == "Q6_K" else range(4, 16)
        raw[:, list(factors)] |= 1
    packed = torch.from_numpy(raw.reshape(-1))
    made = layer(library, kind, packed, len(bits), kind.inputs)
    assert torch.equal(made.weight, values(kind, packed, len(bits)))
    x = 127 * torch.eye(kind.inputs)
    torch.testing.assert_close(made(x), 127 * made.weight.T, rtol=1e-6, atol=1e-4)


@pytest.mark.crossed(3)
@every_format
def test_products_match_float64(isa: str, library: ctypes.CDLL, kind: BlockFormat) -> None:
    for seed, (outputs, inputs) in enumerate(sizes(kind)):
        made = layer(library, kind, blocks(kind, outputs, inputs, seed=seed), outputs, inputs)
        for rows in (1, 2, 5, 8, 9, 17):
            x = random(rows, inputs, seed=rows)
            terms = rounded(x).abs() @ made.weight.double().abs().T
            error = (made(x).double() - rounded(x) @ made.weight.double().T).abs()
            assert float((error / (terms + 1e-30)).max()) < 2e-6


@every_format
def test_rows_do_not_meet(isa: str, library: ctypes.CDLL, kind: BlockFormat) -> None:
    inputs = 3 * kind.inputs
    made = layer(library, kind, blocks(kind, 70, inputs), 70, inputs)
    x = random(17, inputs) * torch.logspace(-3, 3, 17)[:, None]
    alone = torch.cat([made(row[None]) for row in x])
    for rows in range(1, 18):
        assert torch.equal(made(x[:rows]), alone[:rows])


@every_format
def test_all_instruction_sets_agree_to_the_bit(library: ctypes.CDLL, kind: BlockFormat) -> None:
    before = library.ls_isa()
    for byte, halves in itertools.product((None, 0, 0x80, 0x7F, 0xFF), (ORDINARY, HALVES)):
        inputs = 5 * kind.inputs
        made = layer(library, kind, blocks(kind, 45, inputs, byte=byte, halves=halves), 45, inputs)
        x = random(9, inputs)
        # the largest sums that codes can make
        x[0], x[1] = 1.0, -1.0
        results = []
        for name in instruction_sets(library):
            assert library.ls_use_isa(name.encode())
            results.append(torch.cat([made(x[:rows]) for rows in range(1, 10)]))
        assert library.ls_use_isa(before)
        assert results[0].isfinite().all()
        assert all(torch.equal(result, results[0]) for result in results)


@every_format
@pytest.mark.parametrize("byte", [0, 0x80, 0x7F, 0xFF])
def test_extreme_codes_do_not_overflow(
    isa: str, library: ctypes.CDLL, kind: BlockFormat, byte: int
) -> None:
    """Sums of the largest codes times ±127 in every input, which 16 bits cannot hold done carelessly."""
    inputs = 4 * kind.inputs
    raw = blocks(kind, 32, inputs, byte=byte, halves=(0x1C00,))
    made = layer(library, kind, raw, 32, inputs)
    signs = torch.stack((torch.ones(inputs), -torch.ones(inputs), random(inputs).sign()))
    x = 127 * signs
    expected = x.double() @ made.weight.double().T
    torch.testing.assert_close(made(x).double(), expected, rtol=1e-6, atol=1e-3)


@every_format
def test_rows_of_zeros_and_of_nan(isa: str, library: ctypes.CDLL, kind: BlockFormat) -> None:
    inputs = 2 * kind.inputs
    made, x = layer(library, kind, blocks(kind, 40, inputs), 40, inputs), random(4, inputs)
    x[0] = 0
    x[1, inputs - 1] = float("nan")
    x[2, 3], x[2, 17] = float("inf"), float("-inf")
    y = made(x)
    assert torch.equal(y[0], torch.zeros(40))
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert y[3].isfinite().all()


def test_parts_of_several_formats_are_one_layer(isa: str, library: ctypes.CDLL) -> None:
    """As q, k and v of a file whose v has more bits; no part need fill its last tile."""
    inputs, parts, tiles = 512, [("Q4_K", 45), ("Q6_K", 33), ("Q8_0", 64), ("Q5_1", 1)], []
    layers = []
    for name, outputs in parts:
        kind = BLOCK_FORMATS[name]
        layers.append(layer(library, kind, blocks(kind, outputs, inputs), outputs, inputs))
        tiles.append(layers[-1].packed)
    numbers = tuple((BLOCK_FORMATS[name].number, outputs) for name, outputs in parts)
    bias = random(143)
    made = NativeLinear(BLOCKS, 143, inputs, torch.cat(tiles), None, bias, numbers)
    x = random(17, inputs)
    assert torch.equal(made(x), torch.cat([each(x) for each in layers], dim=1) + bias)
    assert torch.equal(made.weight, torch.cat([each.weight for each in layers]))
    for threads in (1, 2, 3, 5):
        assert torch.equal(linear(library, made.struct(), x, threads), made(x))


@every_format
def test_rows_are_packed_in_any_order(library: ctypes.CDLL, kind: BlockFormat) -> None:
    raw = blocks(kind, 90, kind.inputs)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:70]
    tiles = torch.empty(kind.bytes_of(70, kind.inputs), dtype=torch.uint8)
    assert pack_blocks(library, kind, raw, order, kind.inputs, tiles)
    made = NativeLinear(BLOCKS, 70, kind.inputs, tiles, parts=((kind.number, 70),))
    assert torch.equal(made.weight, values(kind, raw, 90)[order])


@every_format
@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7E00])
def test_scales_that_are_no_numbers_are_seen(
    library: ctypes.CDLL, kind: BlockFormat, half: int
) -> None:
    raw = blocks(kind, 70, kind.inputs)
    raw.view(-1, kind.bytes)[69, list(kind.halves[-2:])] = torch.tensor(
        [half & 255, half >> 8], dtype=torch.uint8
    )
    tiles = torch.empty(kind.bytes_of(70, kind.inputs), dtype=torch.uint8)
    assert not pack_blocks(library, kind, raw, torch.arange(70), kind.inputs, tiles)


@every_format
def test_an_embedding_reads_rows(library: ctypes.CDLL, kind: BlockFormat) -> None:
    made = layer(library, kind, blocks(kind, 70, 2 * kind.inputs), 70, 2 * kind.inputs)
    table, ids = BlockEmbedding(made), torch.tensor([[69, 0], [31, 32]])
    assert torch.equal(table(ids), made.weight[ids])
    assert table(ids[:0]).shape == (0, 2, 2 * kind.inputs)
    with pytest.raises(IndexError, match=r"not all in 0\.\.69"):
        table(torch.tensor([70]))


@every_format
def test_bits_per_weight_are_those_of_the_file(kind: BlockFormat) -> None:
    """But for factors of 6 bits, which get bytes."""
    in_file = 8 * kind.bytes / kind.inputs
    here = 8 * kind.tile_bytes(kind.inputs) / 32 / kind.inputs
    assert here == in_file + (0.125 if kind.name in ("Q4_K", "Q5_K") else 0)


def test_tiles_of_another_size_are_refused(library: ctypes.CDLL) -> None:
    kind = BLOCK_FORMATS["Q4_0"]
    made = layer(library, kind, blocks(kind, 32, 64), 32, 64)
    plan = LinearPlan(BLOCKS, 64, 64, made.packed, parts=((kind.number, 64),))
    with pytest.raises(StateError, match="weights of a layer of 64 outputs"):
        NativeLinear(BLOCKS, 64, 64, plan.weights, parts=plan.parts).struct()
    assert block_rows(library, made.plan(), torch.tensor([5])).shape == (1, 64)
