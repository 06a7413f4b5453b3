"""Coded rows against the definitions of their codes."""

from __future__ import annotations

import pytest
import torch

from linspec.errors import ConfigError
from linspec.quantization import nibbles
from linspec.quantization.rows import decode, encode, quantized_width, rounded
from linspec.state.registry import kv_of


@pytest.mark.parametrize("width", [1, 6, 24, 64])
def test_a_row_reads_back_within_half_a_step_of_its_scale(width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(3, 5, width) * torch.tensor([1e-20, 1.0, 1e20])[:, None, None]
    rows = encode(x)
    assert rows.dtype == torch.int8
    assert rows.shape == (3, 5, quantized_width(width))
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((decode(rows, width, torch.float32) - x).abs() <= 0.5001 * step).all()


def test_whole_numbers_up_to_127_are_exact() -> None:
    x = torch.arange(-127.0, 128.0)
    assert torch.equal(rounded(x), x)
    assert torch.equal(rounded(3.5 * x.double()), 3.5 * x.double())


def test_zeros_stay_zeros_and_no_nan_is_lost() -> None:
    assert torch.equal(rounded(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert rounded(torch.tensor([1.0, torch.nan])).isnan().all()


def test_coding_twice_changes_nothing() -> None:
    torch.manual_seed(0)
    rows = encode(torch.randn(40, 64))
    assert torch.equal(encode(decode(rows, 64, torch.float32))[:, :64], rows[:, :64])


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match=r"one of auto, float32, .*int8.*, got 'int3'"):
        kv_of("int3")


@pytest.mark.parametrize("width", [1, 6, 24, 40, 64])
def test_a_row_of_4_bits_reads_back_within_half_a_step_of_its_block(width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(3, 5, width) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    rows = nibbles.encode(x)
    assert rows.dtype == torch.uint8
    assert rows.shape == (3, 5, nibbles.row_bytes(width))
    errors = (nibbles.decode(rows, width, torch.float32) - x).abs()
    for first in range(0, width, nibbles.FEATURES):
        block = x[..., first : first + nibbles.FEATURES]
        step = (block.amax(-1, keepdim=True) - block.amin(-1, keepdim=True)) / 15
        # and what the two float16 of a block round
        rounding = block.abs().amax(-1, keepdim=True) * 2**-10
        assert (errors[..., first : first + block.shape[-1]] <= 0.501 * step + rounding).all()


def test_sixteen_whole_numbers_are_exact() -> None:
    x = torch.arange(64.0) % 16 - torch.tensor([5.0, 2000.0]).repeat_interleave(32)
    assert torch.equal(nibbles.decode(nibbles.encode(x), 64, torch.float64), x.double())


def test_a_block_that_is_all_alike_is_exact_and_no_nan_is_lost() -> None:
    assert torch.equal(nibbles.encode(torch.zeros(2, 32)), torch.zeros(2, 20, dtype=torch.uint8))
    x = torch.full((40,), 0.5)
    assert torch.equal(nibbles.decode(nibbles.encode(x), 40, torch.float32), x)
    for odd in (torch.nan, torch.inf, -torch.inf, 2e6, -7e4):
        x[35] = odd
        found = nibbles.decode(nibbles.encode(x), 40, torch.float32)
        assert found[32:].isnan().all() and (found[:32] == 0.5).all()


def test_coding_twice_in_4_bits_changes_nothing() -> None:
    rows = nibbles.encode(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    again = nibbles.encode(nibbles.decode(rows, 64, torch.float64))
    torch.testing.assert_close(
        nibbles.decode(again, 64, torch.float32),
        nibbles.decode(rows, 64, torch.float32),
        rtol=0,
        atol=5e-3,
    )
