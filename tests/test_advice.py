"""What verbs say beside their results."""

from __future__ import annotations

import pytest
from checkpoints import model_dir

from linspec import LLM
from linspec.cli import advice


@pytest.mark.parametrize("quantize", [None, 8])
def test_a_model_that_reads_many_floats_is_told_of_quantizing(
    quantize: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`linspec chat smollm2-aug` was four times slower than it has to be, and said nothing."""
    model = LLM(model_dir("softmax"), quantize=quantize).model
    assert advice.on_weights(model) is None
    monkeypatch.setattr(advice, "_LARGE", 1)
    said = advice.on_weights(model)
    assert said is None if quantize else said is not None and "--quantize 8" in said
