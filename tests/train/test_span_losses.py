"""Where a budget of exactly seen tokens goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.train.finetune import finetune_loss
from linspec.train.span_losses import SpanLosses, allocate, measure_span_losses

SPANS = [1, 2, 4, 8]


@st.composite
def measured(draw: st.DrawFn) -> list[list[float]]:
    layers = draw(st.integers(1, 5))
    loss = st.floats(0, 4)
    return [draw(st.lists(loss, min_size=4, max_size=4)) for _ in range(layers)]


@given(losses=measured(), more=st.integers(0, 40))
def test_the_budget_is_kept_and_never_makes_things_worse(
    losses: list[list[float]], more: int
) -> None:
    chosen = allocate(losses, SPANS, len(losses) + more)
    assert sum(chosen) <= len(losses) + more
    for layer, span in zip(losses, chosen, strict=True):
        assert layer[SPANS.index(span)] <= layer[0]


def test_rows_go_to_the_layer_that_needs_them() -> None:
    near, far = [1.0, 1.0, 1.0, 1.0], [2.0, 1.9, 1.5, 1.0]
    assert allocate([near, far, near], SPANS, 10) == [1, 8, 1]
    assert allocate([near, far, near], SPANS, 6) == [1, 4, 1]


def test_a_layer_is_left_as_it_was_and_every_layer_gets_a_span(
    tiny_teacher: Callable[..., Decoder],
) -> None:
    teacher = tiny_teacher().requires_grad_(False)
    before = [block.mixer for block in teacher.layers]
    batch = torch.randint(1, 290, (2, 65), generator=torch.Generator().manual_seed(0))
    mixer = MixerConfig(name="aug", group=8, kernel="softmax", taps=4)
    measured = measure_span_losses(teacher, mixer, (0, 1), batch)
    assert [block.mixer for block in teacher.layers] == before
    assert measured.spans == [1, 2, 4, 8]
    found = measured.spans_by_need(8)
    assert set(found) == {0, 1}
    assert sum(found.values()) <= 8
    with pytest.raises(ConfigError, match="1 groups are too few for 2 layers"):
        measured.spans_by_need(1)
    # at the longest span nothing is out of reach: the teacher itself
    expected = float(finetune_loss(teacher, batch))
    assert measured.losses[0][-1] == pytest.approx(expected, rel=1e-2)


def test_the_neediest_layer_is_the_one_that_loses_most() -> None:
    measured = SpanLosses([1, 2], {3: [2.0, 1.0], 5: [1.9, 1.5]})
    assert measured.neediest(1) == [5]
    assert measured.without([5]).losses == {3: [2.0, 1.0]}
