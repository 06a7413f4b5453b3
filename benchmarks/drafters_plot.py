"""The picture of `linspec bench drafters`: times plain decoding, by family of prompts and drafter.

    linspec bench drafters smollm2 --drafter suffix --prompts spec_bench.jsonl --json > blocks.json
    python -m benchmarks.drafters_plot blocks.json int8.json --out docs/results/drafters.png

One panel for each file, named after it. A mark is the mean of a family, a line its 95% interval; plain
decoding against itself, before and after, is drawn too: what lies within its spread says nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#2467d1", "#bc4c00", "#8250df", "#1a7f37", "#9a6700", "#c2185b")
_PLAIN = ("plain", "plain again")
_ALL = "all"


def table(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Of a file: by drafter, its rows by family; all prompts together come first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        found.setdefault(row["drafter"], {})[row["family"]] = row
    return {
        drafter: {_ALL: rows[_ALL]} | {name: row for name, row in rows.items() if name != _ALL}
        for drafter, rows in found.items()
    }


def draw(tables: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> Any:
    """The figure, a panel for each title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.5 * len(tables) + 0.5), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    drafters = list(dict.fromkeys(name for each in tables.values() for name in each))
    colours = dict(zip([d for d in drafters if d not in _PLAIN], _COLOURS, strict=False))
    seen: dict[str, Any] = {}
    for axes, (title, rows) in zip(panels, tables.items(), strict=True):
        families = list(dict.fromkeys(family for each in rows.values() for family in each))
        axes.set_title(title, loc="left", fontsize=11)
        axes.axhline(1, color="#57606a", lw=0.8)
        for at, (drafter, each) in enumerate(rows.items()):
            seen[drafter] = _marks(axes, families, each, at, len(rows), colours.get(drafter))
        axes.set_xticks(range(len(families)), families)
        axes.set_ylabel("times plain")
        axes.grid(axis="y", color="#d8dee4", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    names = [name for name in drafters if name in seen]
    figure.legend([seen[n] for n in names], names, loc="outside right center", frameon=False)
    return figure


def _marks(
    axes: Any,
    families: Sequence[str],
    rows: Mapping[str, Mapping[str, Any]],
    at: int,
    count: int,
    colour: str | None,
) -> Any:
    """A drafter's marks beside those of the others; plain decoding is grey."""
    shift = 0.7 * ((at + 0.5) / count - 0.5)
    places = [families.index(family) + shift for family in rows]
    means = [row["times_plain"] for row in rows.values()]
    below = [mean - row["low"] for mean, row in zip(means, rows.values(), strict=True)]
    above = [row["high"] - mean for mean, row in zip(means, rows.values(), strict=True)]
    return axes.errorbar(
        places, means, [below, above], fmt="o", ms=5, lw=1, color=colour or "#afb8c1"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="what bench drafters --json printed")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    options = parser.parse_args()
    tables = {path.stem: table(path) for path in options.results}
    draw(tables).savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
