"""Quality: every attention in every arrangement, at one budget, softmax beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from linspec.errors import ConfigError
from linspec.report.data import Bar, Bars
from studies.linearized_llm.attentions import AUG, PARTS, PLAIN, choose
from studies.linearized_llm.grid import AttentionTable
from studies.linearized_llm.table import (
    TABLES,
    Cell,
    Result,
    Results,
    Section,
    with_spread,
)
from studies.linearized_llm.training import KIND, train_and_score, training_settings


@TABLES.register(
    "quality",
    summary="each linear attention × {plain, +conv, +grouped, +α·grouped, aug}, softmax beside",
    paper="You et al. 2024, arXiv 2406.07368, tables 2, 12, 14, 15 and 16",
)
class Quality(AttentionTable):
    """Bits per byte of the decoder on held-out text. Columns are `part` or `part (domain)`."""

    name = "quality"
    place = 0

    def cells(self) -> list[Cell]:
        found = []
        for place, domain in enumerate(self.plan.domains):
            for row in self.rows:
                for part in PARTS:
                    found += self._place(row, part, domain, place)
        return found

    def _place(self, row: str, part: str, domain: str, place: int) -> list[Cell]:
        column = self.column(part, domain)
        try:
            choice = choose(row, part, self.plan.size)
        except ConfigError as error:
            return [Cell(table=self.name, row=row, column=column, undefined=str(error))]
        settings = training_settings(self.plan, choice, domain)
        rank = 10.0 * place + _rank(row, part)
        return [
            Cell(
                table=self.name,
                row=row,
                column=column,
                kind=KIND,
                settings=settings,
                seed=seed,
                rank=rank,
            )
            for seed in range(self.plan.seeds)
        ]

    def column(self, part: str, domain: str) -> str:
        """The column of an arrangement in a domain."""
        return part if domain == self.plan.domain else f"{part} ({domain})"

    def measure(self, cell: Cell, folder: Path) -> Result:
        return train_and_score(self.plan, cell, folder)

    def section(self, results: Results) -> Section:
        size, grids = self.plan.size, []
        for domain in self.plan.domains:
            columns = [self.column(part, domain) for part in PARTS]
            begun = [row for row in self.rows if self._begun(results, row, columns)]
            if rows := self.rows if domain == self.plan.domain else begun:
                show = partial(self._show, results)
                grids.append(self.grid(results, rows, columns, show))
        text = (
            f"Held-out bits per byte (lower is better) after {size.tokens:,} training tokens for "
            f"every cell, context {size.context}, groups of {size.group}, {size.taps} taps; the "
            "softmax row is the teacher trained on for the same tokens. With several seeds: mean "
            "(lowest–highest). In the grouped arrangement all attentions but local:softmax weigh the "
            "tokens of a group by the paper's relu(q̂·k̂)², also those whose own weights there are the "
            "teacher's softmax (gdn, gla, hedgehog). Of other domains, the rows that are begun.\n\n"
            + self.reasons(results)
        )
        return Section("Quality", text, tuple(grids), self._plots(results, self.rows))

    def _begun(self, results: Results, row: str, columns: list[str]) -> bool:
        return any(results.of(self.name, row, column) for column in columns)

    def _show(self, results: Results, row: str, column: str) -> str:
        return with_spread(results.figures(self.name, row, column, "bits_per_byte"))

    def _plots(self, results: Results, rows: list[str]) -> tuple[Bars, ...]:
        """Plain beside aug, every row that has both; softmax first."""
        bars = []
        for row in rows:
            for colour, part in enumerate((PLAIN, AUG), 1):
                value = results.mean(self.name, row, part, "bits_per_byte")
                if value is not None:
                    bars.append(Bar(f"{row}, {part}", value, colour))
        if not bars:
            return ()
        title, label = "Each attention, plain and augmented", "bits per byte, lower is better"
        return (Bars(title=title, x_label=label, bars=tuple(bars), digits=3),)


def _rank(row: str, part: str) -> float:
    """The headline first: softmax, the paper's ablation of local, then plain and aug of the rest."""
    if row == "softmax" and part == PLAIN:
        return 0.0
    if row == "local":
        return 1.0
    return 2.0 if part in (PLAIN, AUG) else 3.0
