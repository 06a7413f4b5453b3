"""The page: whole, self-contained, escaped; the picture of a round says what happened in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from linspec.decoding.accepted import Accepted
from linspec.decoding.tree import from_paths
from linspec.errors import CheckpointError, ConfigError
from linspec.report.data import (
    Bar,
    Bars,
    Chart,
    Report,
    Round,
    Sample,
    Series,
    Span,
    Table,
    Tile,
    make_round,
    token_texts,
)
from linspec.report.html import render_html, write_report
from linspec.report.plots import format_value, render
from linspec.report.tree import render_round, visible

EVIL = '<script>alert("1 & 2")</script>'
VOID = {"meta", "link", "br", "hr", "img", "input"}

LINES = Chart(
    title="Speed",
    x_label="tokens",
    y_label="ms",
    series=(
        Series("plain", (256, 1024, 8192), (3, 4, 9)),
        Series("fast", (256, 1024), (2, 2), True),
    ),
    x_unit="tokens",
    log_x=True,
    log_y=True,
)
BARS = Bars(title="Quality", x_label="bits", bars=(Bar("a", 1.25), Bar("b", 1.5, 2)), digits=3)
ROUND = Round(("def", " f", " g", "("), (-1, 0, 0, 1), (0, 1, 3), "):\n", "three tokens")


class Checker(HTMLParser):
    """Fails on tags that are closed in another order than they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def parse(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return checker


def full_report(text: str = "text") -> Report:
    return Report(
        title=text,
        headline=text,
        tiles=(Tile(text, text, text),),
        table=Table(("", text), ((text, text),)),
        plots=(LINES, BARS, Chart(title=text, x_label=text, y_label=text, series=())),
        rounds=(ROUND, Round((text, text), (-1, 0), (0,), text, text)),
        sample=Sample(text, (Span(text, True, 0), Span(text, False, 0)), text),
        notes=(text,),
        facts=((text, text),),
        command=text,
    )


def test_page_parses_and_holds_every_part() -> None:
    found = parse(render_html(full_report()))
    assert found.tags.count("svg") == 5
    assert {"table", "pre", "footer", "h1", "ul", "dl"} <= set(found.tags)
    for part in ("Speed", "Quality", "three tokens", "1.250", "8k"):
        assert part in found.text


def test_text_is_escaped_everywhere() -> None:
    page = render_html(full_report(EVIL))
    found = parse(page)
    assert "script" not in found.tags
    assert "<script" not in page
    assert EVIL in found.text


def test_page_loads_nothing() -> None:
    page = render_html(full_report())
    found = parse(page)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    links = [v for name, v in found.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_page_reads_on_a_phone_in_the_dark() -> None:
    page = render_html(full_report())
    assert "width=device-width" in page
    assert "prefers-color-scheme: dark" in page


def test_empty_report_is_a_page() -> None:
    found = parse(render_html(Report(title="t", headline="h")))
    assert "svg" not in found.tags and "table" not in found.tags


@pytest.mark.parametrize("plot", [LINES, BARS])
def test_plot_takes_colours_and_size_from_the_page(plot: Chart | Bars) -> None:
    svg = render(plot)
    parse(svg)
    head = svg[: svg.index(">")]
    assert "viewBox" in head and "width=" not in head and "height=" not in head
    assert "var(--series-1)" in svg and "var(--series-2)" in svg and "var(--muted)" in svg
    assert not re.search(r"#0[ac]0[bd]\d\d", svg)


def test_plots_of_one_page_share_no_ids() -> None:
    """Clip paths of a second chart once pointed into the first."""
    first = set(re.findall(r'id="([^"]+)"', render(LINES)))
    other = Chart(title="Other", x_label="x", y_label="y", series=LINES.series, log_x=True)
    second = set(re.findall(r'id="([^"]+)"', render(other)))
    assert first and second
    assert not first & second


def test_round_shows_what_was_accepted() -> None:
    svg = render_round(ROUND)
    parse(svg)
    boxes = re.findall(r'<g class="(\w+)">.*?<text[^>]*>([^<]*)</text>', svg)
    assert sorted(boxes) == [
        ("accepted", "("),
        ("accepted", "·f"),
        ("bonus", "):↵"),
        ("rejected", "·g"),
        ("root", "def"),
    ]
    assert '3 draft tokens, 2 accepted"' in svg
    # the accepted path is one row
    heights = re.findall(r'<g class="(\w+)"><rect x="[^"]*" y="([^"]*)"', svg)
    assert len({y for kind, y in heights if kind != "rejected"}) == 1


def test_boxes_of_a_round_do_not_overlap() -> None:
    tree = from_paths(0, [(1, 2, 3), (1, 4), (5, 6), (7,), (5, 8, 9)])
    texts = tuple(f"token number {i}" for i in range(len(tree)))
    svg = render_round(Round(texts, tree.parents, (0, 1), "bonus"))
    boxes = [
        tuple(map(float, found))
        for found in re.findall(
            r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg
        )
    ]
    assert len(boxes) == len(tree) + 1
    for i, (x, y, width, height) in enumerate(boxes):
        for u, v, wide, high in boxes[:i]:
            assert x + width <= u or u + wide <= x or y + height <= v or v + high <= y


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" self", "·self"),
        (" ", "·"),
        ("        ", "·×8"),
        ("\n    x", "↵·×4x"),
        ("\t\r", "⇥␍"),
        ("", "∅"),
        ("a" * 40, "a" * 13 + "…"),
        ("\x00", "�"),
    ],
)
def test_white_space_is_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (8192, "tokens", "8k"),
        (256, "tokens", "256"),
        (512_000, "tokens", "512k"),
        (100_000, "tokens", "100k"),
        (1_250_000, "tokens", "1.25M"),
        (790_000, "bytes", "790 kB"),
        (6_291_456, "bytes", "6.29 MB"),
        (2.5e9, "bytes", "2.5 GB"),
        (0.5, "plain", "0.5"),
        (float("nan"), "plain", "–"),
    ],
)
def test_values_are_written_for_people(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text  # type: ignore[arg-type]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_characters_of_several_tokens_belong_to_the_last() -> None:
    assert token_texts(Bytes(), list("aé".encode()), [98]) == ["a", "", "é"]


def test_round_of_a_verified_tree() -> None:
    tree = from_paths(97, [(98, 99), (100,)])
    made = make_round(Bytes(), tree, Accepted((0, 1), 101, None), "caption")
    assert made == Round(("a", "b", "c", "d"), (-1, 0, 1, 0), (0, 1), "e", "caption")


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 x values for 1"):
        Series("s", (1, 2), (1,))
    with pytest.raises(ConfigError, match="1 cells in a table of 2"):
        Table(("a", "b"), (("x",),))


def test_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(full_report("old"), path)
    before = path.read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        write_report(full_report("new"), tmp_path / "file" / "report.html")
    assert path.read_text() == before
