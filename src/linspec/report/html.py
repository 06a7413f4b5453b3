"""A report as one HTML file: nothing is loaded from elsewhere, it reads on a phone, light or dark.

write_report(report, Path("report.html"))
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from linspec.report.data import (
    Bars,
    Chart,
    Report,
    Round,
    Sample,
    Section,
    Span,
    Table,
    Tile,
)
from linspec.report.plots import render
from linspec.report.style import STYLE
from linspec.report.tree import render_round
from linspec.utils.files import replace_text

# how a page of linspec is told from others; the second stands in those of linspec 0.1
SIGNS = ('<meta name="generator" content="linspec">', "<title>linspec")


def write_report(report: Report, path: Path) -> Path:
    """Write the page as a whole; returns its path. Raises CheckpointError when the disk refuses."""
    replace_text(path, render_html(report))
    return path


def render_html(report: Report) -> str:
    """The page. All text of the report is escaped."""
    body = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="headline">{escape(report.headline)}</p>',
        _tiles(report.tiles),
        *map(_section, report.sections),
        _table(report.table) if report.table else "",
        _plots(report.plots),
        _rounds(report.rounds),
        _sample(report.sample) if report.sample else "",
        _notes(report.notes),
        _footer(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{SIGNS[0]}\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{_join(body)}\n</main>\n</body>\n</html>\n"
    )


def _join(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)


def _section(section: Section) -> str:
    parts = [
        f"<section><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p></section>",
        _table(section.table, "") if section.table else "",
        *(_sample(sample, sample.caption) for sample in section.samples),
        _plots(section.plots, ""),
    ]
    return _join(parts)


def _heading(title: str) -> str:
    return f"<h2>{escape(title)}</h2>" if title else ""


def _tiles(tiles: tuple[Tile, ...]) -> str:
    if not tiles:
        return ""
    cells = (
        f'<div class="tile"><span>{escape(tile.label)}</span><b>{escape(tile.value)}</b>'
        f"<small>{escape(tile.note)}</small></div>"
        for tile in tiles
    )
    return f'<section class="tiles">{_join(cells)}</section>'


def _table(table: Table, title: str = "Measured") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = (
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<section>{_heading(title)}<div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{_join(rows)}</tbody></table></div></section>"
    )


def _plots(plots: tuple[Chart | Bars, ...], title: str = "Plots") -> str:
    if not plots:
        return ""
    figures = (
        f"<figure><h3>{escape(plot.title)}</h3>{render(plot)}"
        f"<figcaption>{escape(plot.note)}</figcaption></figure>"
        for plot in plots
    )
    return f'<section>{_heading(title)}<div class="plots">{_join(figures)}</div></section>'


def _rounds(rounds: tuple[Round, ...]) -> str:
    if not rounds:
        return ""
    figures = (
        f'<figure class="round"><div class="scroll">{render_round(round_)}</div>'
        f"<figcaption>{escape(round_.caption)}</figcaption></figure>"
        for round_ in rounds
    )
    legend = (
        '<p class="legend"><span class="key root">newest token</span> '
        '<span class="key accepted">accepted draft</span> '
        '<span class="key bonus">bonus token</span> '
        '<span class="key rejected">rejected draft</span></p>'
    )
    explained = (
        "<p>The heads draft a tree, the model reads the whole tree in one step, and the path "
        "that agrees with what the model itself would say is kept. "
        "· is a space, ·×8 eight of them, ↵ the end of a line.</p>"
    )
    return (
        f"<section><h2>Rounds, token by token</h2>{explained}{legend}"
        f'<div class="rounds">{_join(figures)}</div></section>'
    )


def _sample(sample: Sample, title: str = "") -> str:
    """A text in colours, under a heading, or under the usual one with its caption."""
    spans = "".join(_span(span) for span in sample.spans)
    shown = (
        f"<h3>{escape(title)}</h3>"
        if title
        else f"<h2>What it wrote</h2><p>{escape(sample.caption)}</p>"
    )
    legend = (
        '<p class="legend"><span class="key prompt">prompt</span> '
        '<span class="key accepted">accepted draft</span> '
        '<span class="key bonus">bonus token</span></p>'
    )
    return (
        f"<section>{shown}{legend}"
        f'<pre class="sample"><span class="prompt">{escape(sample.prompt)}</span>{spans}</pre>'
        "</section>"
    )


def _span(span: Span) -> str:
    kind = "accepted" if span.drafted else "bonus"
    return f'<span class="{kind}" title="round {span.round}">{escape(span.text)}</span>'


def _notes(notes: tuple[str, ...]) -> str:
    if not notes:
        return ""
    items = _join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<section><h2>How it was measured</h2><ul>{items}</ul></section>"


def _footer(report: Report) -> str:
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in report.facts
    )
    command = f"<p>Made by <code>{escape(report.command)}</code></p>" if report.command else ""
    return f"<footer>{command}<dl>{facts}</dl></footer>"
