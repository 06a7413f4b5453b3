"""The page of a study: markdown tables, plots as SVG files beside it, and the paper's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linspec.checkpoints.resolve import EMBEDDED
from studies.lib import page as pages
from studies.linearized_llm.paper import comparison, speaks
from studies.linearized_llm.plan import MODULE, Plan
from studies.linearized_llm.table import TABLES, Results, Section, Table

_PAPER = """\
# The paper's tables, measured here

You et al. 2024, "When Linear Attention Meets Autoregressive Decoding" (arXiv 2406.07368), at the
size of this machine. The command below writes this page; a dash is a cell that is not measured yet.
The teacher, the data and the budgets are small: directions and ratios compare with the paper,
absolute figures do not.
"""
_RECIPES = """\
# Linearization recipes side by side

One teacher made linear in several ways, each at the same number of tokens. The command below writes
this page; a dash is a cell that is not measured yet.
"""

SIGNS = tuple(text.split("\n", 1)[0] for text in (_PAPER, _RECIPES))


def write_page(
    plan: Plan, page: Path, tables: Sequence[Table], results: Results, machine: Mapping[str, Any]
) -> None:
    """Write `page` and its plots, each whole or not at all."""
    introduction = _RECIPES if [table.name for table in tables] == ["recipes"] else _PAPER
    parts = [introduction, _command(plan, tables), _facts(plan, machine)]
    if speaks(results) or len(tables) == len(TABLES.names()):
        parts.append("## Beside the paper\n\n" + comparison(results))
    parts += [_section(table.section(results), page) for table in tables]
    pages.write_page(page, "\n".join(parts))


def _command(plan: Plan, tables: Sequence[Table]) -> str:
    words: list[str] = []
    if len(tables) < len(TABLES.names()):
        words += [word for table in tables for word in ("--table", table.name)]
    size, _, tokens = plan.size.name.partition("-")
    words += ["--size", size, *(("--tokens", tokens) if tokens else ())]
    words += [word for row in plan.rows for word in ("--row", row)]
    if str(plan.teacher) not in EMBEDDED:
        words += ["--teacher", Path(plan.teacher).name]
    words += ["--recall-share", str(plan.recall_share)] if plan.recall_share else []
    words += [word for name in plan.domains for word in ("--data", name)]
    words += ["--seeds", str(plan.seeds)]
    files = ", ".join(name for name in plan.domains if name != "stdlib")
    told = f"\nName the files of this data in place of: {files}.\n" if files else ""
    return f"{pages.command_block(MODULE, words)}\n{told}"


def _facts(plan: Plan, machine: Mapping[str, Any]) -> str:
    shape = plan.config
    return (
        f"{pages.facts(machine)} Teacher: {Path(plan.teacher).name}, {shape.layers} layers, width "
        f"{shape.width}. Data: {', '.join(plan.domains)}. Size: {plan.size.name}.\n"
    )


def _section(section: Section, page: Path) -> str:
    lines = [f"## {section.title}\n", section.text.strip() + "\n"]
    lines += [pages.markdown(grid.columns, grid.rows) + "\n" for grid in section.grids]
    for plot in section.plots:
        lines.append(pages.draw(plot, page) + "\n")
        lines += [f"{plot.note}\n"] if plot.note else []
    return "\n".join(lines)
