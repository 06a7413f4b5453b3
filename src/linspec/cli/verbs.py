"""How verbs of two words are found (`bench load` beside `bench MODEL`), what became of old ones, and how
wrong usage ends: in one line and with 2.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from linspec.cli.console import explain, say
from linspec.utils.messages import did_you_mean

SECOND = ("load",)
# verbs of 0.1.0 that measure more than linspec itself: modules that run from a clone
MOVED = {
    ("study",): "studies.linearized_llm",
    ("bench", "peers"): "benchmarks.peers",
}
_LONGEST_LINE = 1000
# typer re-exports only some of click's errors; this is the base of all that mean wrong usage
UsageError: Any = typer.BadParameter.__mro__[1]


class _OneLine:
    """A command whose every failure is one line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the verb that `args` name, and exit with its code."""
        try:
            code = super().main(  # type: ignore[misc]  # of what it is mixed into
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )
        except UsageError as error:
            code = _wrong_usage(error)
        except typer.Abort:
            code = 130
        # options are checked before the verb begins
        except Exception as error:
            if os.environ.get("LINSPEC_DEBUG"):
                raise
            say(explain(error))
            code = 1
        sys.exit(code)


class Verb(_OneLine, TyperCommand):
    """A command of its own."""


class Verbs(_OneLine, TyperGroup):
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


def _wrong_usage(error: Any) -> int:
    """One line about it, with the way to the help; without any verb, the help itself."""
    if error.message.startswith("Usage:"):
        error.show()
        return int(error.exit_code)
    command = error.ctx.command_path.replace("bench-", "bench ") if error.ctx else "linspec"
    if hasattr(error, "option_name"):
        said = error.message + did_you_mean(error.option_name, error.possibilities or ())
    else:
        said = error.format_message()
    said = " ".join(said.split()).rstrip(".")
    say(f"error: {said[:_LONGEST_LINE]}; see {command} --help")
    return int(error.exit_code)


def _moved(old: tuple[str, ...], module: str, rest: list[str]) -> str:
    new = shlex.join(["python", "-m", module, *rest])
    return f"error: linspec {' '.join(old)} now runs from a clone of linspec's repository: {new}"
