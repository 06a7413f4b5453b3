"""Charts as SVG that takes its colours from the page, so that one picture fits light and dark.

matplotlib draws with marker colours; `render` replaces each by a CSS variable of the page.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from typing import Any

from linspec.report.data import Bars, Chart, Unit
from linspec.report.style import PALETTE

SERIES_COLOURS = 5
_SERIES = tuple(f"#0a0b{i:02d}" for i in range(1, SERIES_COLOURS + 1))
_TEXT, _MUTED, _GRID = "#0c0d01", "#0c0d02", "#0c0d03"
_VARIABLES = {
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)},
    _TEXT: "var(--text)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
}
_MARKERS = ("o", "s", "D", "^", "v")
_INCHES = (4.6, 2.9)
_BAR_INCHES = 0.36


def render(plot: Chart | Bars) -> str:
    """The plot as an <svg> element without fixed size or colours."""
    import matplotlib

    salt = hashlib.sha256(repr(plot).encode()).hexdigest()[:8]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": _TEXT,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.0,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(style):
        figure = _bars(plot) if isinstance(plot, Bars) else _lines(plot)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _embed(out.getvalue(), plot.title, salt)


def standalone(plot: Chart | Bars) -> str:
    """The plot as an SVG file that brings the page's colours, light and dark, with it."""
    style = f"<style>{PALETTE}svg {{ background: var(--card); }}</style>"
    drawn = render(plot)
    end = drawn.index(">", drawn.index("<svg")) + 1
    return f"{drawn[:end]}{style}{drawn[end:]}"


def _figure(height: float) -> tuple[Any, Any]:
    # without pyplot: no global state, no window system
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES[0], height), layout="constrained")
    return figure, figure.subplots()


def _lines(chart: Chart) -> Any:
    figure, axes = _figure(_INCHES[1])
    if chart.log_x:
        axes.set_xscale("log", base=2)
    if chart.log_y:
        axes.set_yscale("log")
    for i, line in enumerate(chart.series):
        # many points are a curve: markers would only hide it
        marker = _MARKERS[i % len(_MARKERS)] if len(line.x) <= 20 else ""
        axes.plot(
            line.x,
            line.y,
            color=_colour(line.colour or i + 1),
            marker=marker,
            # behind the last colour they begin again: hollow, so that no two lines look alike
            markerfacecolor=None if i < SERIES_COLOURS else "none",
            linestyle="--" if line.dashed else "-",
            label=line.label,
        )
    if chart.y_from_zero:
        axes.set_ylim(bottom=0)
    _label_axes(axes, chart)
    if len(chart.series) > 1:
        figure.legend(
            loc="outside upper left", ncols=2, frameon=False, fontsize=8.5, borderaxespad=0
        )
    return figure


def _colour(number: int) -> str:
    return _SERIES[(number - 1) % SERIES_COLOURS]


def _label_axes(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    if chart.x_unit == "count":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.log_x:
        axes.set_xticks(sorted({x for line in chart.series for x in line.x}))
        axes.xaxis.set_minor_locator(NullLocator())
    if chart.log_y:
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_value(v, chart.x_unit)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: format_value(v, chart.y_unit)))


def _bars(bars: Bars) -> Any:
    figure, axes = _figure(0.75 + _BAR_INCHES * len(bars.bars))
    places = range(len(bars.bars))
    drawn = axes.barh(
        places,
        [bar.value for bar in bars.bars],
        height=0.62,
        color=[_colour(bar.colour) for bar in bars.bars],
    )
    labels = [f"{bar.value:,.{bars.digits}f}" for bar in bars.bars]
    axes.bar_label(drawn, labels=labels, padding=4, color=_TEXT)
    axes.set_yticks(places, [bar.label for bar in bars.bars])
    axes.tick_params(axis="y", colors=_TEXT)
    # the first bar on top, and as much room above it as between two
    axes.set_ylim(len(bars.bars) - 0.5, -0.5)
    axes.margins(x=0.16)
    # a label wider than the bars' part reaches under their names, not out of the picture
    axes.set_xlabel(bars.x_label, loc="right")
    axes.tick_params(length=0)
    axes.set_xlim(left=0)
    axes.set_xticks([])
    axes.spines[["bottom"]].set_visible(False)
    return figure


def format_value(value: float, unit: Unit) -> str:
    """A number for a tick or a table: 8192 tokens are 8k, 2**20 bytes are 1 MB."""
    if not math.isfinite(value):
        return "–"
    if unit == "tokens":
        return _tokens(value)
    if unit == "bytes":
        return _bytes(value)
    return f"{value:g}"


def _tokens(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:.3g}M"
    if value % 1024 == 0 and value % 1000:
        return f"{value / 1024:g}k"
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _embed(svg: str, title: str, salt: str) -> str:
    """Only the <svg> element: sized and coloured by the page, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for reference in ('id="', "url(#", 'href="#'):
        svg = svg.replace(reference, f"{reference}s{salt}-")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    name = re.sub(r"[<>&\"]", " ", title)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
