"""How verbs of two words are found: `bench peers` and `bench load` beside `bench MODEL`."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

SECOND = ("peers", "load")


class Verbs(TyperGroup):
    """The verbs of the command line."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's own class of contexts
        """Join the words of a verb of two."""
        if args[:1] == ["bench"] and args[1:2] and args[1] in SECOND:
            args = [f"bench-{args[1]}", *args[2:]]
        return super().parse_args(ctx, args)
