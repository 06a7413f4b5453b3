"""The command line of a module that runs from a clone; the same habits as the verbs of `linspec`."""

from __future__ import annotations

from collections.abc import Callable

import typer

from linspec.cli.verbs import Verb

AGAIN = "give the same command to go on; finished cells are kept"


def command(verb: Callable[..., None], module: str, example: str) -> typer.Typer:
    """`python -m MODULE` for one verb, with an example that runs."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(cls=Verb, epilog=f"Example: {called(module)} {example}".rstrip())(verb)
    return app


def called(module: str) -> str:
    """How the module is called."""
    return f"python -m {module}"


def words(text: str) -> tuple[str, ...]:
    """The words of a list like int8,q4_0."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
