"""What a table of the study is: cells, how to measure one, how to show them."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from linspec.report.data import Bars, Chart
from linspec.report.data import Table as Grid
from linspec.utils.registry import Registry
from studies.linearized_llm.plan import Plan

# raised when the meaning of a cached figure changes
FORMAT = 1

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement. settings: plain JSON types, everything that determines the figures.

    kind: cells of one kind and equal settings are the same measurement, whatever table they stand
    in. rank: lower is measured earlier. undefined: why there can be no such cell, or empty.
    """

    table: str
    row: str
    column: str
    kind: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    rank: float = 0.0
    undefined: str = ""

    @property
    def key(self) -> str:
        """The name of this measurement on disk."""
        told = json.dumps([FORMAT, self.kind, self.settings, self.seed], sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(told.encode()).hexdigest()[:20]}"


@dataclass(frozen=True, slots=True)
class Section:
    """One table as it is shown: text, grids and plots."""

    title: str
    text: str
    grids: tuple[Grid, ...] = ()
    plots: tuple[Chart | Bars, ...] = ()


class Results:
    """Finished cells of all tables; figures come as the list of their seeds."""

    def __init__(self, done: Iterable[tuple[Cell, Result]]) -> None:
        self._found: dict[tuple[str, str, str], dict[int, Result]] = {}
        for cell, result in done:
            self._found.setdefault((cell.table, cell.row, cell.column), {})[cell.seed] = result

    def _seeds(self, table: str, row: str, column: str) -> dict[int, Result]:
        return self._found.get((table, row, column), {})

    def of(self, table: str, row: str, column: str) -> list[Result]:
        """The results of one place, a seed each; those that failed are left out."""
        return [r for r in self._seeds(table, row, column).values() if "error" not in r]

    def errors(self, table: str, row: str, column: str) -> list[str]:
        """Why seeds of one place failed."""
        return [r["error"] for r in self._seeds(table, row, column).values() if "error" in r]

    def figures(self, table: str, row: str, column: str, name: str) -> list[float]:
        """One figure of every seed of one place."""
        return list(self._by_seed(table, row, column, name).values())

    def _by_seed(self, table: str, row: str, column: str, name: str) -> dict[int, float]:
        seeds = self._seeds(table, row, column).items()
        return {seed: float(r[name]) for seed, r in seeds if r.get(name) is not None}

    def pairs(
        self, table: str, first: tuple[str, str], second: tuple[str, str], name: str
    ) -> tuple[list[float], list[float]]:
        """One figure at two places (row, column), of the seeds that both have."""
        ours, theirs = (self._by_seed(table, *place, name) for place in (first, second))
        both = [seed for seed in ours if seed in theirs]
        return [ours[seed] for seed in both], [theirs[seed] for seed in both]

    def mean(self, table: str, row: str, column: str, name: str) -> float | None:
        """The mean over seeds, None when nothing is measured yet."""
        figures = self.figures(table, row, column, name)
        return statistics.mean(figures) if figures else None


def with_spread(
    figures: Sequence[float], digits: int = 3, *, sign: str = "", unit: str = ""
) -> str:
    """'1.424 (1.415–1.430)': the mean and, where seeds differ, the lowest and highest.

    sign: '+' for differences, '+0.2 (-0.5 to +1.0)'.
    """
    if not figures:
        return "–"
    shown = (statistics.mean(figures), min(figures), max(figures))
    mean, lowest, highest = (f"{figure:{sign}.{digits}f}{unit}" for figure in shown)
    to = " to " if sign else "–"
    return mean if lowest == highest else f"{mean} ({lowest}{to}{highest})"


class Table:
    """Base of the tables. place: where on the page, from 0 on."""

    name = ""
    place = 9

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def cells(self) -> list[Cell]:
        """Every cell, the ones that are not defined included."""
        raise NotImplementedError

    def measure(self, cell: Cell, folder: Path) -> Result:
        """The figures of one cell as plain JSON types; `folder` is its own to work in.

        Stopped at any moment, it is called again with what it left there.
        """
        raise NotImplementedError

    def section(self, results: Results) -> Section:
        """What is shown of the finished cells."""
        raise NotImplementedError

    @cached_property
    def listed(self) -> list[Cell]:
        """`cells`, once."""
        return self.cells()

    def choices(self) -> Sequence[str]:
        """Rows that the user can choose among, first the one that always stands beside; () if none."""
        return ()

    @cached_property
    def rows(self) -> list[str]:
        """The choices that the user asked for."""
        choices, asked = self.choices(), self.plan.rows
        return [row for row in choices if not asked or row == choices[0] or row in asked]

    def grid(
        self,
        results: Results,
        rows: Sequence[str],
        columns: Sequence[str],
        show: Callable[[str, str], str],
        corner: str = "attention",
    ) -> Grid:
        """Rows × columns; '–' is not measured yet, a cell that failed or is not defined says so."""
        undefined = {(c.row, c.column) for c in self.listed if c.undefined}

        def text(row: str, column: str) -> str:
            if (row, column) in undefined:
                return "not defined"
            if results.errors(self.name, row, column) and not results.of(self.name, row, column):
                return "failed"
            return show(row, column)

        lines = tuple((row, *(text(row, column) for column in columns)) for row in rows)
        return Grid((corner, *columns), lines)

    def figure_grids(
        self,
        results: Results,
        rows: Sequence[str],
        columns: Sequence[str],
        figures: Mapping[str, tuple[str, int]],
        corner: str = "attention",
    ) -> tuple[Grid, ...]:
        """Rows × columns once for each figure; figures: title to name in the result, and digits."""

        def shown(name: str, digits: int) -> Callable[[str, str], str]:
            return lambda row, column: with_spread(
                results.figures(self.name, row, column, name), digits
            )

        return tuple(
            self.grid(results, rows, columns, shown(*figure), f"{corner}: {title}")
            for title, figure in figures.items()
        )

    def reasons(self, results: Results) -> str:
        """Why cells are not defined or failed, as a list."""
        # a place that is told once is not told again for another domain or seed: dictionaries as sets
        lines: dict[str, dict[str, None]] = {}
        for cell in self.listed:
            place = f"{cell.row} {cell.column.partition(' (')[0]}"
            if cell.undefined:
                lines.setdefault(cell.undefined, {})[place] = None
            for error in results.errors(self.name, cell.row, cell.column) if not cell.seed else ():
                lines.setdefault(f"failed: {error}", {})[place] = None
        return "\n".join(f"- {', '.join(places)}: {why}" for why, places in lines.items())


TABLES: Registry[Table] = Registry("table")
