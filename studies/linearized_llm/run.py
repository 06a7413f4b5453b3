"""Fill the tables: the most telling cell first, every finished one kept, the page always up to date.

result = study(make_plan("runs/study", budget=30), ["quality"], budget=30)
print(result.to_json()["tables"]["quality"]["done"])
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linspec.bench.machine import machine
from linspec.errors import CheckpointError, ConfigError, LinspecError
from linspec.utils.places import check_text, check_workspace, mark_folder
from studies.lib.plan import check_above_zero, check_places
from studies.linearized_llm.cache import Cache
from studies.linearized_llm.page import SIGNS, write_page
from studies.linearized_llm.plan import CELLS, MODULE, Plan
from studies.linearized_llm.table import TABLES, Cell, Result, Results, Table

# a further seed is worth a cell this much lower in rank
_SEED_RANK = 2.0


@dataclass(frozen=True, slots=True)
class Study:
    """A study as it stands. measured: cells of this sitting; remaining: still to do."""

    plan: Plan
    tables: tuple[Table, ...]
    cells: tuple[tuple[Cell, Result | None], ...]
    measured: int
    remaining: int
    seconds: float
    page: Path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "out": str(self.plan.out),
            "page": str(self.page),
            "size": self.plan.size.name,
            "seeds": self.plan.seeds,
            "measured": self.measured,
            "remaining": self.remaining,
            "seconds": round(self.seconds, 1),
            "tables": {table.name: self._table(table.name) for table in self.tables},
        }

    def _table(self, name: str) -> dict[str, Any]:
        ours = [(cell, result) for cell, result in self.cells if cell.table == name]
        defined = [(cell, result) for cell, result in ours if not cell.undefined]
        return {
            "done": sum(result is not None for _, result in defined),
            "total": len(defined),
            "rows": [
                {"row": c.row, "column": c.column, "seed": c.seed, "key": c.key, **result}
                for c, result in defined
                if result is not None
            ],
            "undefined": [
                {"row": c.row, "column": c.column, "reason": c.undefined}
                for c, _ in ours
                if c.undefined
            ],
        }


def study(
    plan: Plan,
    tables: Sequence[str] = (),
    *,
    budget: float | None = None,
    page: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Study:
    """Measure what is missing of `tables` (all when empty) and write the page; returns the state.

    budget: minutes of this sitting: no cell is begun that would likely end after it, but a first
    one. page: the markdown file, OUT/paper.md if None; its plots lie in a folder beside it. A cell
    that fails (a loss that is not finite) is a result and says why. Ctrl-C loses at most the cell
    under way, which goes on from its own state; finished cells are not measured again. Several
    processes may fill one folder. Raises ConfigError for an unknown table or row, CheckpointError when
    the disk refuses or a cell is of a newer format.
    """
    check_above_zero("--budget", budget, "no limit")
    check_places(plan.out, page)
    made = tuple(TABLES[name](plan) for name in tables or TABLES.names())
    made = tuple(sorted(made, key=lambda table: table.place))
    _check_rows(plan.rows, made)
    page = page or plan.out / "paper.md"
    check_workspace(plan.out, MODULE, CELLS)
    check_text(page, SIGNS)
    cache, began, measured = Cache(plan.out), clock(), 0
    by_name = {table.name: table for table in made}
    wanted = order([cell for table in made for cell in table.listed])
    mark_folder(plan.out, MODULE)
    _write(plan, page, made, cache)
    for cell in wanted:
        if cache.get(cell) is not None:
            continue
        left = None if budget is None else 60 * budget - (clock() - began)
        if left is not None and (
            left <= 0 or (measured and (cache.seconds(cell.kind) or 0) > left)
        ):
            continue
        if _measure(by_name[cell.table], cell, cache, clock):
            measured += 1
            _write(plan, page, made, cache)
    _write(plan, page, made, cache)
    cells = _state(made, cache)
    remaining = sum(result is None and not cell.undefined for cell, result in cells)
    return Study(plan, made, tuple(cells), measured, remaining, clock() - began, page)


def _check_rows(asked: Sequence[str], tables: Sequence[Table]) -> None:
    known = list(dict.fromkeys(row for table in tables for row in table.choices()))
    for row in asked:
        if row not in known:
            names = "', '".join(known)
            there = f"there are '{names}'" if known else "these tables are filled whole"
            raise ConfigError(f"no table has a row {row!r} to choose; {there}")


def order(cells: Sequence[Cell]) -> list[Cell]:
    """Defined cells, each measurement once, so that a partly filled table already says something."""
    unique: dict[str, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.rank + _SEED_RANK * cell.seed):
        if not cell.undefined:
            unique.setdefault(cell.key, cell)
    return list(unique.values())


def _measure(table: Table, cell: Cell, cache: Cache, clock: Callable[[], float]) -> bool:
    """Measure and keep one cell; False when another process has it or has just finished it."""
    with cache.claim(cell) as folder:
        if folder is None or cache.get(cell) is not None:
            return False
        told = f"{cell.table}: {cell.row}, {cell.column}, seed {cell.seed}"
        print(told, file=sys.stderr, flush=True)
        began = clock()
        try:
            result = table.measure(cell, folder)
        except CheckpointError:
            # a full disk or a folder in use says nothing about the cell
            raise
        except LinspecError as error:
            result = {"error": " ".join(str(error).split())}
        cache.put(cell, result, clock() - began, machine())
    return True


def _state(tables: Sequence[Table], cache: Cache) -> list[tuple[Cell, Result | None]]:
    return [
        (cell, None if cell.undefined else cache.get(cell))
        for table in tables
        for cell in table.listed
    ]


def _write(plan: Plan, page: Path, tables: Sequence[Table], cache: Cache) -> None:
    done = [(cell, result) for cell, result in _state(tables, cache) if result is not None]
    write_page(plan, page, tables, Results(done), machine())
