"""The verbs `info` and `list`: what is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

import linspec
from linspec.cli.checks import whole
from linspec.cli.console import guarded, place_on, print_facts, print_json, print_table, say
from linspec.cli.options import Json


@guarded()
def info(
    model: Annotated[
        str | None, typer.Argument(help="A model, to say what it is instead.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None,
        # not by the option itself, which would end at a wrong LINSPEC_THREADS
        typer.Option(callback=whole(), help="CPU threads, as LINSPEC_THREADS.", show_default="all"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Versions, devices and the kernels that will be used, with the reason; or what MODEL is.

    A wrong switch in the environment is named at the end, with exit code 1.
    """
    if model is None:
        from linspec.bench.library import info as library

        facts = library(threads)
    else:
        from linspec.bench.model import info as of_model

        facts = of_model(model, threads)
    errors = facts.get("errors", ())
    if as_json:
        print_json(facts)
    else:
        print_facts({name: value for name, value in facts.items() if name != "errors"})
    for error in errors:
        say(f"error: {error}")
    if errors:
        raise typer.Exit(1)


@guarded()
def list_plugins(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure µs per token and layer of each mixer here (some 20 seconds); later lists show it.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Every mixer, drafter, verifier, policy, cache, loop and kind of training: options and papers.

    us of a mixer: microseconds of a token in one layer, its MLP included, of the embedded models' shape in
    float32 after 2,048 tokens, where --measure was given once on this machine.
    """
    from linspec.bench.mixers import measure_mixers, measured_mixers
    from linspec.cli.plugins import catalogue

    place_on("cpu", None)
    found = catalogue(measure_mixers() if measure else measured_mixers())
    if as_json:
        print_json(found)
        return
    for axis, entries in found.items():
        options = _options(entries)
        columns = [key for key in dict.fromkeys(k for e in entries for k in e) if key != "options"]
        print_table(axis, columns, [[_shown(e.get(key)) for key in columns] for e in entries])
        if options:
            print_table(f"options of {axis}", ["name", "option", "default", "help"], options)


def _shown(value: Any) -> Any:
    return "" if value is None else value


def _options(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each option; those that several plug-ins share stand once."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        for each in entry["options"]:
            default = each["default"] if each["default"] is not None else "must be given"
            names.setdefault((each["name"], default, each["help"]), []).append(entry["name"])
    return [
        # a name a line: the first column of a table is never cut off
        ["all" if 1 < len(who) == len(entries) else ",\n".join(who), *option]
        for option, who in names.items()
    ]


def version(asked: bool) -> None:
    """Print the name and the version, where that is asked for."""
    if asked:
        print(f"linspec {linspec.__version__}")
        raise typer.Exit(0)
