"""The tables of `benchmarks.long_context` in Markdown: what is found, held and read, and how long it takes.

    python -m benchmarks.long_context_table results.jsonl
    python -m benchmarks.long_context_table results.jsonl --beside int8

Ways are rows, lengths columns. Recall and times stand beside those of one way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.long_context import kept
from benchmarks.long_context_bytes import bytes_of

Rows = dict[tuple[str, int, str], dict[str, Any]]
# of a row, and of the row that it stands beside
Cell = Callable[[dict[str, Any], dict[str, Any]], str]


def found(row: dict[str, Any], beside: dict[str, Any]) -> str:
    """Needles found of asked, by needles in a text, and bits per token."""
    parts = [f"{row[f'needles_{kind}']}/{row[f'asked_{kind}']}" for kind in _kinds(row)]
    bits = [f"{row['bits_per_token']:.2f}"] if "bits_per_token" in row else []
    return ", ".join(parts + bits)


def retained(row: dict[str, Any], beside: dict[str, Any]) -> str:
    """Of the needles that the other row has found, those that this one has, by needles in a text."""
    parts = []
    for kind in _kinds(row):
        mine, other = (each.get(f"right_{kind}") for each in (row, beside))
        if mine is None or other is None or len(mine) != len(other):
            return "–"
        both = sum(pair == ("1", "1") for pair in zip(mine, other, strict=True))
        parts.append(f"{both}/{other.count('1')}")
    return ", ".join(parts)


def _kinds(row: dict[str, Any]) -> list[int]:
    """Needles in a text, of each kind of question."""
    return sorted(int(name.removeprefix("asked_")) for name in row if name.startswith("asked_"))


def megabytes(row: dict[str, Any], beside: dict[str, Any]) -> str:
    """Of cache, held and read; in brackets what is held in memory with `--offload`."""
    held, read = (size / 1e6 for size in bytes_of(row))
    memory = row.get("memory_bytes", row.get("state_bytes", 0)) / 1e6
    offloaded = f" ({memory:.2f})" if 0 < memory < held else ""
    return f"{held:.2f}{offloaded}, {read:.2f}"


def step(row: dict[str, Any], beside: dict[str, Any]) -> str:
    """Milliseconds of a step by the clock and of processor time, each with how many times as fast it is."""
    clock, other = (1000 / each["tokens_per_second"] for each in (row, beside))
    return f"{_times(clock, other)}, {_times(row['processor_ms'], beside['processor_ms'])}"


def first_token(row: dict[str, Any], beside: dict[str, Any]) -> str:
    """Seconds to the first token, likewise."""
    names = "first_token_s", "first_token_processor_s"
    return ", ".join(_times(row[name], beside[name]) for name in names)


def _times(value: float, beside: float) -> str:
    return f"{value:.2f} ({beside / value:.2f}×)"


TABLES: tuple[tuple[str, str, Cell], ...] = (
    ("Found with one needle, of several, bits per token", "quality", found),
    ("Found of what the way beside has found: one needle, several", "quality", retained),
    ("MB of cache: held (in memory, with `--offload`), read by a step", "quality", megabytes),
    ("A step, ms: clock, processor (times as fast)", "speed", step),
    ("First token, s: clock, processor (times as fast)", "speed", first_token),
)


def table(rows: Rows, kind: str, cell: Cell, beside: str) -> list[str]:
    """Lines of one table; of a kind that nobody measured, none."""
    lengths = sorted({length for _, length, each in rows if each == kind})
    ways = list(dict.fromkeys(way for way, _, each in rows if each == kind))
    if not ways:
        return []
    lines = ["| reads | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for way in ways:
        row = [rows.get((way, length, kind)) for length in lengths]
        others = [rows.get((beside, length, kind)) for length in lengths]
        cells = [
            cell(mine, other or mine) if mine else "–"
            for mine, other in zip(row, others, strict=True)
        ]
        lines.append(f"| `{way}` | " + " | ".join(cells) + " |")
    return lines


def tables(rows: Rows, beside: str) -> str:
    """All tables."""
    made = [(title, table(rows, kind, cell, beside)) for title, kind, cell in TABLES]
    return "\n\n".join("\n".join([f"**{title}**", "", *lines]) for title, lines in made if lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what benchmarks.long_context wrote")
    parser.add_argument("--beside", default="int8", help="the way that others are compared with")
    options = parser.parse_args(arguments)
    print(tables(kept(options.results), options.beside))


if __name__ == "__main__":
    main()
