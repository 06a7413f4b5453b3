"""The attention benchmark: every kind of cache, and what a line says."""

from __future__ import annotations

from itertools import count

from benchmarks.attention import KINDS, Speed, speeds


def test_every_kind_of_cache_is_timed() -> None:
    ticks = count()
    found = list(
        speeds(widths=(64,), groups=(3,), context=70, repeats=2, clock=lambda: float(next(ticks)))
    )
    assert [each.kind for each in found] == list(KINDS)
    # floats, halves, codes with a scale, and blocks of codes, of keys and values in 4 layers and 3 KV heads
    assert [each.cache_bytes for each in found] == [
        70 * 24 * size for size in (256, 128, 128, 68, 40)
    ]
    assert {(each.seconds, each.tree_seconds) for each in found} == {(1.0, 1.0)}


def test_a_line_says_speed_and_ratio() -> None:
    line = str(Speed("int8", 64, 3, 10**9, 0.1, 0.15))
    assert "100.00 ms" in line
    assert "10.0 GB/s" in line
    assert line.endswith("8 nodes ÷ 1: 1.50")
