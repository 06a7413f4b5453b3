"""Design choices of augmented attention: α's start, taps, group size, and the mask of the conv."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studies.linearized_llm.attentions import AUG, Choice, choose
from studies.linearized_llm.table import (
    TABLES,
    Cell,
    Result,
    Results,
    Section,
    Table,
    with_spread,
)
from studies.linearized_llm.training import KIND, train_and_score, training_settings

TAPS = (4, 8, 16, 32)
GROUPS = (16, 32, 64, 128)
_COLUMNS = ("bits per byte", "last training loss", "bits per byte with the future in view")


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    choice: Choice
    rank: float
    # the teacher never sees the future: its distribution would hide the collapse of the loss
    kl_weight: float | None = None

    @property
    def changed(self) -> dict[str, Any]:
        return {} if self.kl_weight is None else {"kl_weight": self.kl_weight}


@TABLES.register(
    "design",
    summary="α from 0 or 1, conv taps, group size, masked or unmasked convolution",
    paper="You et al. 2024, arXiv 2406.07368, figures 3 and 6b",
)
class Design(Table):
    """One choice at a time, on `aug`."""

    name = "design"
    place = 1

    def _rows(self) -> list[_Row]:
        aug = choose("local", AUG, self.plan.size)
        mixer = aug.mixer
        return [
            _Row("α from 0", aug, 2.0),
            _Row("α from 1", Choice(mixer, "alpha=1"), 2.0),
            _Row("conv masked, cross-entropy only", aug, 2.0, 0.0),
            _Row("conv unmasked, cross-entropy only", Choice(mixer, "unmasked"), 2.0, 0.0),
            *(_Row(f"{n} taps", Choice(replace(mixer, taps=n)), 3.0) for n in TAPS),
            *(_Row(f"groups of {n}", Choice(replace(mixer, group=n)), 3.0) for n in GROUPS),
        ]

    def cells(self) -> list[Cell]:
        return [
            Cell(
                table=self.name,
                row=row.label,
                column=AUG,
                kind=KIND,
                settings=training_settings(self.plan, row.choice, self.plan.domain, **row.changed),
                seed=seed,
                rank=row.rank,
            )
            for row in self._rows()
            for seed in range(self.plan.seeds)
        ]

    def measure(self, cell: Cell, folder: Path) -> Result:
        return train_and_score(self.plan, cell, folder)

    def section(self, results: Results) -> Section:
        names = dict(
            zip(_COLUMNS, ("bits_per_byte", "train_loss", "leaking_bits_per_byte"), strict=True)
        )

        def show(row: str, column: str) -> str:
            return with_spread(results.figures(self.name, row, AUG, names[column]))

        rows = [row.label for row in self._rows()]
        text = (
            "One choice of `aug` at a time, at the budget of the quality table. An unmasked "
            "convolution reads the next token's value: its training loss falls because the answer "
            "is in view, and so does a score taken the same way. When it decodes, the future does "
            "not exist; the first column is that.\n\n" + self.reasons(results)
        )
        return Section("Design", text, (self.grid(results, rows, _COLUMNS, show, "choice"),))
