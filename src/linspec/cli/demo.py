"""The verb `demo`: the tour."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.console import guarded, place_on, print_json, quiet_stdout
from linspec.cli.options import Json, Overwrite, Threads


@guarded("give the same command to go on with what is trained")
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: under 90 seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Where the report and the model go.")] = Path(
        "linspec-demo"
    ),
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Linearize the embedded model, train its drafter, race it against plain decoding; report."""
    place_on("cpu", threads)
    with quiet_stdout(as_json):
        from linspec.demo import run_demo

        result = run_demo(out=out, quick=quick, overwrite=overwrite)
    if as_json:
        print_json(result.to_json())
