"""How verbs of two words are found (`bench load` beside `bench MODEL`), and what became of old ones."""

from __future__ import annotations

import shlex
import sys

import typer
from typer.core import TyperGroup

SECOND = ("load",)
# verbs of 0.1.0 that measure more than linspec itself: modules that run from a clone
MOVED = {
    ("study",): "studies.linearized_llm",
    ("bench", "peers"): "benchmarks.peers",
}


class Verbs(TyperGroup):
    """The verbs of the command line."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's own class of contexts
        """Join the words of a verb of two; a verb that moved is answered with the new command."""
        for old, module in MOVED.items():
            if tuple(args[: len(old)]) == old:
                print(_moved(old, module, args[len(old) :]), file=sys.stderr)
                ctx.exit(2)
        if args[:1] == ["bench"] and args[1:2] and args[1] in SECOND:
            args = [f"bench-{args[1]}", *args[2:]]
        return super().parse_args(ctx, args)


def _moved(old: tuple[str, ...], module: str, rest: list[str]) -> str:
    new = shlex.join(["python", "-m", module, *rest])
    return f"error: linspec {' '.join(old)} now runs from a clone of linspec's repository: {new}"
