"""Markdown pages that are made from cells: tables, plots as SVG files beside the page, the command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from linspec.report.data import Bars, Chart
from linspec.report.plots import standalone
from linspec.utils.files import replace_text


def write_page(page: Path, text: str) -> None:
    """Write a page whole or not at all, with the folders above it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_text(page, text)


def draw(plot: Chart | Bars, page: Path) -> str:
    """Write a plot into the folder of the page's name; returns the line that shows it."""
    name = re.sub(r"[^a-z0-9]+", "-", plot.title.lower()).strip("-")
    file = page.with_suffix("") / f"{name}.svg"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, standalone(plot))
    return f"![{plot.title}]({file.parent.name}/{file.name})"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def command_block(module: str, words: Sequence[str]) -> str:
    """The command that writes a page; where files lie differs from machine to machine."""
    return f"```bash\n{shlex.join(['python', '-m', module, *words, '--out', 'DIR'])}\n```"


def facts(machine: Mapping[str, object]) -> str:
    """What a page says of the machine, on one line."""
    return "Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "."
