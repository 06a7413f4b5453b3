"""The picture of long contexts: its bytes are those of the states."""

from __future__ import annotations

import pytest

from benchmarks.long_context import WAYS, Way
from benchmarks.long_context_plot import draw, held_bytes, parts_of, points, read_bytes
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer

WIDTH = 64


def test_bytes_of_codes_scales_and_bounds() -> None:
    pages = make_mixer("pages:budget=128")
    assert held_bytes(MixerConfig(), "int8", 1024, WIDTH) == 1024 * 2 * (64 + 4)
    # of every 64 keys two extremes in 16 bits, and codes in two
    codes = 1024 // 64 * (2 * 64 * 2 + 64 * 64 // 4)
    assert held_bytes(pages, "int8", 1024, WIDTH) == 1024 * 136 + codes
    assert read_bytes(pages, "int8", 1024, WIDTH) == (128 + 2 * 64) * 136 + codes
    bounds = 1024 // 16 * 2 * 64 * 2
    by_bounds = make_mixer("pages:budget=128,judge=bounds")
    assert held_bytes(by_bounds, "int8", 1024, WIDTH) == 1024 * 136 + bounds
    # of a short text everything is read
    assert read_bytes(pages, "int8", 128, WIDTH) == held_bytes(pages, "int8", 128, WIDTH)
    near = make_mixer("streaming:span=4")
    assert read_bytes(near, "int8", 1024, WIDTH) == read_bytes(near, "int8", 2048, WIDTH)


@pytest.mark.parametrize(
    ("way", "exact", "exact_mixer", "others"),
    [
        (Way(model="embedded-softmax"), 12, "softmax", None),
        (Way(model="embedded-softmax", attention="pages:budget=512"), 12, "pages", None),
        (Way(model="embedded-softmax", attention="lserve:exact=5"), 5, "pages", "streaming"),
        (Way(model="smollm2-aug"), 11, "softmax", "streaming"),
        (Way(model="smollm2-aug", attention="pages:budget=1024"), 11, "pages", "streaming"),
    ],
)
def test_heads_by_their_mixers(way: Way, exact: int, exact_mixer: str, others: str | None) -> None:
    (count, mixer), *rest = parts_of(way)
    assert (count, mixer.name) == (exact, exact_mixer)
    assert [other.name for _, other in rest] == ([others] if others else [])


def test_a_panel_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "int8", Way(model="embedded-softmax"))
    row = {"needles_1": 3, "asked_1": 4}
    rows = {("int8", 128, "quality"): row, ("delta 1", 128, "quality"): row}
    assert [(each["way"], each["share"]) for each in points(rows, 128)] == [("int8", 75.0)]
    assert len(draw(rows, [128, 256]).axes) == 2
