"""The likeliest token and its score: first among equals, whatever is not a number shows."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DEVICES
from hypothesis import given
from hypothesis import strategies as st

from linspec.decoding.likeliest import likeliest, likeliest_token


@given(rows=st.integers(1, 5), width=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_it_is_the_first_of_the_greatest(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # few values, so that several are the greatest
    logits = torch.randint(-3, 4, (rows, width), generator=generator).float()
    tokens, scores = likeliest(logits)
    assert scores == logits.amax(-1).tolist()
    assert tokens == [row.index(max(row)) for row in logits.tolist()]
    assert likeliest_token(logits[0]) == tokens[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_in_every_precision_and_on_every_device(dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(4, 300).to(device, dtype)[::2, ::3]
    tokens, scores = likeliest(logits)
    assert tokens == logits.float().argmax(-1).tolist()
    assert scores == logits.amax(-1).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_the_score(device: str, value: float) -> None:
    logits = torch.zeros(2, 9, device=device)
    logits[1, 4] = value
    _, scores = likeliest(logits)
    assert math.isfinite(scores[0])
    assert not math.isfinite(scores[1])
