"""A search for spans costs a share of its run, keeps its progress, and says what it does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linspec.errors import TrainingError
from linspec.mixers.specs import make_mixer
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train import span_losses as span_losses_module
from linspec.train.data import Windows
from linspec.train.span_losses import SpanLosses
from linspec.train.span_search import PASSES, SHARE, Costs, Search, choose, search_spans
from linspec.train.student import by_need
from linspec.utils.progress import Progress


def shape(layers: int, width: int, positions: int) -> Decoder:
    """A decoder without memory for its weights."""
    with torch.device("meta"):
        return Decoder(
            DecoderConfig(
                vocab_size=49_152,
                width=width,
                layers=layers,
                heads=width // 64,
                kv_heads=width // 64,
                head_width=64,
                mlp_width=3 * width,
                max_positions=positions,
            )
        )


@given(
    layers=st.integers(1, 40),
    width=st.sampled_from([64, 576, 2048]),
    positions=st.sampled_from([1024, 8192, 131_072]),
    trained=st.sampled_from([64, 512, 1024]),
    tokens=st.integers(1, 10**8),
    groups=st.integers(1, 16),
)
def test_a_search_took_many_times_as_long_as_its_run(
    layers: int, width: int, positions: int, trained: int, tokens: int, groups: int
) -> None:
    costs = Costs(shape(layers, width, positions), make_mixer("aug"), range(layers))
    search, least = choose(costs, trained, tokens, longest=positions, groups=groups)
    run = PASSES * costs.forward(tokens, trained)
    if search is None:
        assert least.cost > SHARE * run
        return
    assert search.cost <= SHARE * run
    assert search.spans[-1] > groups or search.spans[-1] * 64 >= min(4 * trained, positions)


def test_a_135m_model_was_searched_for_47_minutes_before_three_minutes_of_training() -> None:
    costs = Costs(shape(30, 576, 8192), make_mixer("aug"), range(30))
    assert choose(costs, 1024, 30_000, longest=8192, groups=6)[0] is None
    found, _ = choose(costs, 1024, 2_200_000, longest=8192, groups=6)
    assert found is not None and found.spans == (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture
def windows() -> Windows:
    return Windows(np.random.default_rng(0).integers(1, 290, 4000), 64, 0)


def search(teacher: Decoder, windows: Windows, file: Path, **options: Any) -> SpanLosses | None:
    settings: dict[str, Any] = {"groups": 1, "needed": False} | options
    tokens = settings.pop("tokens", 10**6)
    mixer = make_mixer("aug", group=8, taps=4)
    return search_spans(teacher, mixer, (0, 1), windows, tokens, file, **settings)


def test_a_search_that_was_interrupted_began_again(
    tiny_teacher: Callable[..., Decoder],
    windows: Windows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = tiny_teacher().requires_grad_(False)
    whole = search(teacher, windows, tmp_path / "whole.json")
    assert whole is not None
    measured: list[int] = []

    class Watched(Progress):
        """Stops the search after its sixth measurement."""

        def update(self, done: int, note: str = "") -> None:
            measured.append(done)
            if done == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(span_losses_module, "Progress", Watched)
    with pytest.raises(KeyboardInterrupt):
        search(teacher, windows, tmp_path / "cut.json")
    # the second time the search is whole, and the third time there is nothing left to measure
    for _ in range(2):
        assert search(teacher, windows, tmp_path / "cut.json") == whole
    assert measured == list(range(1, 1 + sum(map(len, whole.losses.values()))))


def test_a_run_too_short_for_a_search_spreads_evenly_and_says_so(
    tiny_teacher: Callable[..., Decoder],
    windows: Windows,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = tiny_teacher()
    with caplog.at_level(logging.WARNING):
        assert search(teacher, windows, tmp_path / "reach.json", tokens=1) is None
    assert "spans are not searched" in caplog.text and "--tokens" in caplog.text
    mixers = (make_mixer("aug", group=8),) * 2
    found = by_need(teacher, mixers, (0, 1), None, exact_tokens=24, softmax_layers=0)
    assert [mixer.span for mixer in found] == [3, 3]
    # what is needed is measured all the same, and its price is told
    with caplog.at_level(logging.WARNING):
        assert search(teacher, windows, tmp_path / "need.json", tokens=1, needed=True)
    assert "% of the run; --span" in caplog.text


def test_a_search_of_linspec_0_1_goes_on(
    tiny_teacher: Callable[..., Decoder], windows: Windows, tmp_path: Path
) -> None:
    (tmp_path / "reach.json").write_text(json.dumps([[1, 2], [[2.0, 1.0], [3.0, 1.0]]]))
    found = search(tiny_teacher(), windows, tmp_path / "reach.json")
    assert found == SpanLosses([1, 2], {0: [2.0, 1.0], 1: [3.0, 1.0]})


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[[1], [[true]]]", '{"windows": "x"}'])
def test_a_damaged_search_was_an_unexpected_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "spans.json"
    file.write_text(content)
    with pytest.raises(TrainingError, match=r"spans\.json is damaged: .*; remove the file"):
        Search.read(file)


def test_a_search_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    search = Search(2, 64, (1, 2, 4), 1e9, {0: [3.5], 4: []})
    search.save(tmp_path / "spans.json")
    assert Search.read(tmp_path / "spans.json") == search
