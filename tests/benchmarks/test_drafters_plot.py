"""The picture of drafters: every family of every drafter has a mark, with its interval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.drafters_plot import draw, table


def test_families_and_drafters_are_drawn_with_their_intervals(tmp_path: Path) -> None:
    rows = [
        {"drafter": drafter, "family": family, "times_plain": mean, "low": 0.9, "high": 1.5}
        for drafter, mean in (("plain", 1.0), ("suffix", 1.2))
        for family in ("qa", "all")
    ]
    (tmp_path / "int8.json").write_text(json.dumps({"rows": rows}))
    found = table(tmp_path / "int8.json")
    assert list(found["suffix"]) == ["all", "qa"]
    figure = draw({"int8": found})
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "int8"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all", "qa"]
    assert len(axes.containers) == 2
    ends = axes.containers[1].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in ends] == [[pytest.approx(0.9), 1.5]] * 2
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
