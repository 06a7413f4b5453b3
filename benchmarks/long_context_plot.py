"""The picture of `benchmarks.long_context`: needles found against the bytes of cache that a step reads.

    python -m benchmarks.long_context_plot results.jsonl --out docs/results/long-context.png

One panel a length. A filled mark stands at the bytes that a step reads, a hollow one at those that are held
(`benchmarks.long_context_bytes`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.long_context import kept
from benchmarks.long_context_bytes import bytes_of

# what it reads hangs on the text
_UNCOUNTED = "delta"
_COLOURS = (
    *("#2467d1", "#bc4c00", "#e08a3c", "#7a3300", "#8250df", "#c297ff"),
    *("#57606a", "#9a6700", "#c2185b", "#1a7f37", "#56d364"),
)
_MARKERS = "osD^v"


def points(rows: dict[tuple[str, int, str], dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """By way: its share of found needles, and megabytes held and read."""
    found = []
    for (name, at, kind), row in rows.items():
        if at != length or kind != "quality" or name.startswith(_UNCOUNTED):
            continue
        held, read = (size / 1e6 for size in bytes_of(row))
        share = 100 * row["needles_1"] / row["asked_1"]
        found.append({"way": name, "share": share, "held": held, "read": read})
    return found


def draw(rows: dict[tuple[str, int, str], dict[str, Any]], lengths: Sequence[int]) -> Any:
    """The figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(3.9 * len(lengths) + 2.2, 3.8), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for name, _, _ in rows))
    seen: dict[str, Any] = {}
    for axes, length in zip(panels, lengths, strict=True):
        axes.set_title(f"{length:,} tokens", loc="left", fontsize=11)
        for each in points(rows, length):
            at = names.index(each["way"])
            look = {"color": _COLOURS[at % len(_COLOURS)], "marker": _MARKERS[at % len(_MARKERS)]}
            share = each["share"]
            axes.plot([each["read"], each["held"]], [share] * 2, color=look["color"], lw=0.8)
            axes.plot(each["held"], share, mfc="none", ms=7, linestyle="", **look)
            seen[each["way"]] = axes.plot(each["read"], share, ms=7, linestyle="", **look)[0]
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MB of cache (filled: read by a step, hollow: held)")
        axes.set_ylim(-6, 106)
        axes.margins(x=0.1)
        axes.grid(color="#d8dee4", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("one needle found, %")
    names = [name for name in names if name in seen]
    figure.legend([seen[n] for n in names], names, loc="outside right center", frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what benchmarks.long_context wrote")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--ways", nargs="+", help="those to show; all by default")
    options = parser.parse_args()
    rows = kept(options.results)
    shown = {key: row for key, row in rows.items() if not options.ways or key[0] in options.ways}
    draw(shown, options.lengths).savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
