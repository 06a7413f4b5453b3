"""What the demo says while it runs: lines, a stream of coloured tokens, one table."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from linspec.report.data import Span, Table

Echo = Callable[[str], object]


class _Lines(io.TextIOBase):
    """A text file that hands whole lines to a function."""

    def __init__(self, echo: Echo) -> None:
        self._echo, self._rest = echo, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._echo(line)
        return len(text)


class Columns:
    """Answers to one question beside each other, each with its speed."""

    def __init__(self, question: str, names: Sequence[str]) -> None:
        self.question, self.names = question, names
        self._texts = [Text() for _ in names]
        self._titles = list(names)
        self.show: Callable[[], object] = lambda: None

    def add(self, column: int, spans: Sequence[Span], seconds: float) -> None:
        """All that a column holds by now; seconds: since its first token."""
        parts = [(span.text, "green" if span.drafted else "default") for span in spans]
        self._texts[column] = Text.assemble(*parts)
        if seconds:
            speed = (len(spans) - 1) / seconds
            self._titles[column] = f"{self.names[column]}, {speed:,.0f} tokens/s"
        self.show()

    def drawn(self) -> RichTable:
        """As a table of one line."""
        table = RichTable(title=self.question, title_justify="left", expand=True, show_lines=False)
        for title in self._titles:
            table.add_column(title, ratio=1, vertical="top")
        table.add_row(*self._texts)
        return table


class Screen:
    """Writes to standard error, or line by line to `echo` as plain text."""

    def __init__(self, echo: Echo | None = None) -> None:
        if echo is None:
            self.console = Console(stderr=True, highlight=False)
        else:
            self.console = Console(
                file=_Lines(echo),  # type: ignore[arg-type]
                width=100,
                color_system=None,
                highlight=False,
            )

    def step(self, number: int, total: int, text: str) -> None:
        """Announce a phase."""
        self.console.print(Text.assemble((f"[{number}/{total}] ", "bold cyan"), (text, "bold")))

    def say(self, text: str) -> None:
        """One line of detail."""
        self.console.print(Text("      " + text), soft_wrap=True)

    def prompt(self, text: str) -> None:
        """The prompt of a stream that follows."""
        legend = Text.assemble(
            "      ", ("accepted drafts", "green"), ", ", ("bonus tokens", "bold blue"), ":"
        )
        self.console.print(legend)
        self.token(text, "dim")

    def token(self, text: str, style: str) -> None:
        """Text as it is decided, on the line where the text before it ended."""
        self.console.print(Text(text, style=style), end="", soft_wrap=True)

    def drafted(self, text: str, *, accepted: bool) -> None:
        """A token of the stream."""
        self.token(text, "green" if accepted else "bold blue")

    @contextmanager
    def side_by_side(self, question: str, *names: str) -> Iterator[Columns]:
        """Columns that grow at once on a terminal; elsewhere they are written when all are full."""
        columns = Columns(question, names)
        if not self.console.is_terminal:
            yield columns
            self.console.print(columns.drawn())
            return
        with Live(columns.drawn(), console=self.console, refresh_per_second=12) as live:
            columns.show = lambda: live.update(columns.drawn())
            yield columns

    def end(self) -> None:
        """End a stream."""
        self.console.print()

    def table(self, table: Table, title: str) -> None:
        """A table, its first column naming the rows."""
        shown = RichTable(title=title, title_justify="left")
        for i, name in enumerate(table.columns):
            shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*map(Text, row))
        self.console.print(shown)
