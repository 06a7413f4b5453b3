"""What a report shows, as plain values: numbers, texts, trees. Nothing here knows how it is drawn.

lines = (Series("plain", (128, 2048), (3.1, 3.2)),)
chart = Chart(title="Speed", x_label="context", y_label="ms per token", series=lines)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from linspec.decoding.accepted import Accepted
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError

Unit = Literal["plain", "count", "bytes", "tokens"]


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points in the order of x. colour: one of the page's 1..5, 0 for the next in turn."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dashed: bool = False
    colour: int = 0

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ConfigError(f"{self.label}: {len(self.x)} x values for {len(self.y)} y values")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over a shared axis. Units say how ticks are written; note is the caption below."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_unit: Unit = "plain"
    y_unit: Unit = "plain"
    log_x: bool = False
    log_y: bool = False
    y_from_zero: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar in one of the page's colours 1..5."""

    label: str
    value: float
    colour: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Horizontal bars from zero, each with its value written beside it in `digits` decimals."""

    title: str
    x_label: str
    bars: tuple[Bar, ...]
    digits: int = 2
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigError(f"a row of {len(row)} cells in a table of {len(self.columns)}")


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure that deserves to be seen first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of speculative decoding with its tokens as text.

    texts, parents: the tree, node 0 being its root. path: accepted nodes from the root down. bonus:
    the token that the target added.
    """

    texts: tuple[str, ...]
    parents: tuple[int, ...]
    path: tuple[int, ...]
    bonus: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Generated text: an accepted draft, or a token that the target decided itself."""

    text: str
    drafted: bool
    round: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what followed it."""

    prompt: str
    spans: tuple[Span, ...]
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page with a heading of its own, ahead of the rest."""

    title: str
    text: str = ""
    table: Table | None = None
    plots: tuple[Chart | Bars, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole page. facts: (name, value) pairs about the machine; command: what made the page."""

    title: str
    headline: str
    tiles: tuple[Tile, ...] = ()
    sections: tuple[Section, ...] = ()
    table: Table | None = None
    plots: tuple[Chart | Bars, ...] = ()
    rounds: tuple[Round, ...] = ()
    sample: Sample | None = None
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    command: str = ""


def token_texts(tokenizer: Any, tokens: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text that each token adds behind `before`.

    A character whose bytes are spread over several tokens belongs to the last of them.
    """
    window = list(before[-4:])
    shown = tokenizer.decode(window)
    texts = []
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        whole = not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "")
        if whole:
            window = window[-4:]
            shown = tokenizer.decode(window)
    return texts


def make_round(tokenizer: Any, tree: TokenTree, accepted: Accepted, caption: str = "") -> Round:
    """A verified tree with its tokens as text."""
    texts = [tokenizer.decode([token]) for token in (*tree.tokens, accepted.token)]
    return Round(tuple(texts[:-1]), tree.parents, accepted.path, texts[-1], caption)
