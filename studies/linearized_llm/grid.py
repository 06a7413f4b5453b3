"""Tables whose rows are the attentions of the registry."""

from __future__ import annotations

from typing import Any

from linspec.errors import ConfigError
from studies.linearized_llm.attentions import AUG, PLAIN, Choice, attentions
from studies.linearized_llm.table import Cell, Table

# softmax and local are the headline of every backbone
_HEADLINE = ("softmax", "local")


class AttentionTable(Table):
    """A row for every attention."""

    def choices(self) -> list[str]:
        return attentions()


class BackboneTable(AttentionTable):
    """Every attention, plain and aug, on one backbone. kind: see `Cell`."""

    kind = ""

    def choose(self, row: str, part: str) -> Choice:
        """The mixer at one place; raises ConfigError, with the reason, if there is none."""
        raise NotImplementedError

    def settings(self, choice: Choice) -> dict[str, Any]:
        """Everything that determines the figures of a cell."""
        raise NotImplementedError

    def cells(self) -> list[Cell]:
        return [
            cell for row in self.rows for part in (PLAIN, AUG) for cell in self._place(row, part)
        ]

    def _place(self, row: str, part: str) -> list[Cell]:
        try:
            choice = self.choose(row, part)
        except ConfigError as error:
            return [Cell(table=self.name, row=row, column=part, undefined=str(error))]
        settings = self.settings(choice)
        # after the same place of the tables before this one
        rank = (self.place + 1) / 10
        rank += _HEADLINE.index(row) if row in _HEADLINE else len(_HEADLINE)
        return [
            Cell(
                table=self.name,
                row=row,
                column=part,
                kind=self.kind,
                settings=settings,
                seed=seed,
                rank=rank,
            )
            for seed in range(self.plan.seeds)
        ]
