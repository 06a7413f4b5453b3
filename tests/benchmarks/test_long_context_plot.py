"""The picture of long contexts: its bytes are those of the states."""

from __future__ import annotations

import pytest

from benchmarks.long_context_bytes import (
    bytes_of,
    held_bytes,
    offloaded_bytes,
    parts_of,
    unread_bytes,
)
from benchmarks.long_context_plot import draw, points
from benchmarks.long_context_ways import WAYS, Way, way_of
from linspec.checkpoints.hub import load_config
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer

WIDTH = 64
CONFIG = load_config("embedded-softmax")


def read_bytes(mixer: MixerConfig, kv: str, length: int, width: int) -> int:
    return held_bytes(mixer, kv, length, width) - unread_bytes(mixer, kv, length, CONFIG)


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


def test_a_layer_that_selects_reads_everything() -> None:
    parts = parts_of(way_of("tidal:budget=128,first=1,again=3"), "embedded-softmax")
    assert len(parts) == 6
    row = 2 * (64 + 4)
    unread = [unread_bytes(mixer, "int8", 1024, CONFIG) for _, mixer in parts]
    assert unread == [0, 0, (1024 - 128 - 2 * 64) * row, 0, *[(1024 - 128 - 2 * 64) * row] * 2]


def test_a_shadow_reads_what_it_selects() -> None:
    shadow = make_mixer("shadow:budget=256,rank=32")
    # seven segments of 256 are closed, an eighth is near; a chunk of each is read as it is
    rows, factors = 7 * 256 - 256 - 7 * 8, 0
    row = {"way": "shadow:budget=256,rank=32", "length": 2048, "model": "embedded-softmax"}
    assert offloaded_bytes(row) == 12 * 7 * 256 * 64 * 2
    assert unread_bytes(shadow, "float16", 2048, CONFIG) == 2 * (rows * 64 + rows * 16 + factors)


def test_what_was_measured_goes_before_what_is_counted() -> None:
    row = {"way": "pages:budget=128", "length": 1024, "model": "embedded-softmax"}
    held, read = bytes_of(row)
    assert held == 12 * held_bytes(make_mixer("pages:budget=128"), "int8", 1024, WIDTH)
    assert held - read == 12 * (1024 - 128 - 2 * 64) * 136
    assert bytes_of({**row, "state_bytes": held + 5}) == (held + 5, read + 5)
    assert bytes_of({**row, "state_bytes": 7, "read_bytes": 3}) == (7, 3)


def test_a_panel_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "int8", Way(model="embedded-softmax"))
    row = {"needles_1": 3, "asked_1": 4, "length": 128}
    rows = {(way, 128, "quality"): {**row, "way": way} for way in ("int8", "delta 1")}
    assert [(each["way"], each["share"]) for each in points(rows, 128)] == [("int8", 75.0)]
    assert len(draw(rows, [128, 256]).axes) == 2
