"""The verbs `info` and `list`: what is here."""

from __future__ import annotations

from typing import Annotated

import typer

from linspec.cli.console import guarded, place_on, print_facts, print_json, print_table
from linspec.cli.options import Json, Threads


@guarded()
def info(
    model: Annotated[
        str | None, typer.Argument(help="A model, to say what it is instead.", show_default=False)
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Versions, devices and the kernels that will be used, with the reason; or what MODEL is."""
    place_on("cpu", threads)
    if model is None:
        from linspec.bench.machine import info as library

        facts = library()
    else:
        from linspec.models.description import describe

        facts = describe(model)
    print_json(facts) if as_json else print_facts(facts)


@guarded()
def list_plugins(as_json: Json = False) -> None:
    """Every mixer, drafter, verifier and policy, with the paper it comes from."""
    from linspec.plugins import catalogue

    found = catalogue()
    if as_json:
        print_json(found)
        return
    for axis, entries in found.items():
        columns = list(dict.fromkeys(key for entry in entries for key in entry))
        print_table(axis, columns, [[e.get(key, "") for key in columns] for e in entries])
