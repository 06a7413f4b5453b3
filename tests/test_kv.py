"""Coded rows against the definition of symmetric 8-bit codes."""

from __future__ import annotations

import pytest
import torch

from linspec.errors import ConfigError
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
    with pytest.raises(ConfigError, match=r"one of auto, float32, .*int8.*, got 'int4'"):
        kv_of("int4")
