"""`python -m studies.linearized_llm`: the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import real, whole
from linspec.cli.console import guarded, place_on, print_json, quiet_stdout, say
from linspec.cli.options import Data, Json, RecallShare, Threads
from studies.lib.command import AGAIN, called, command
from studies.linearized_llm.plan import MODULE


@guarded(AGAIN)
def study(
    out: Annotated[Path, typer.Option(help="Folder of finished cells and of the page.")] = Path(
        "runs/study"
    ),
    table: Annotated[
        list[str] | None, typer.Option(help="A table; repeatable.", show_default="all")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            callback=real(above=0), help="Minutes of this sitting.", show_default="no limit"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="default, small or tiny cells.", show_default="by --budget"),
    ] = None,
    seeds: Annotated[int, typer.Option(callback=whole(), help="Seeds of cells that train.")] = 1,
    row: Annotated[
        list[str] | None,
        typer.Option(help="An attention or recipe to fill; repeatable.", show_default="all"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            callback=whole(), help="Training tokens of a cell.", show_default="the size's"
        ),
    ] = None,
    teacher: Annotated[str, typer.Option(help="The softmax model.")] = "embedded-softmax",
    encoder: Annotated[
        str | None,
        typer.Option(help="A BERT directory.", show_default="that of linspec[encoders]"),
    ] = None,
    data: Data = None,
    recall_share: RecallShare = None,
    page: Annotated[
        Path | None, typer.Option(help="The markdown page.", show_default="OUT/paper.md")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train and measure the paper's tables, cell by cell; goes on where it was stopped."""
    from studies.linearized_llm import make_plan
    from studies.linearized_llm import study as library

    place_on("cpu", threads)
    with quiet_stdout():
        plan = make_plan(
            out,
            teacher=teacher,
            data=data or ["stdlib"],
            size=size,
            budget=budget,
            tokens=tokens,
            seeds=seeds,
            rows=row or (),
            encoder=encoder,
            recall_share=recall_share or 0.0,
        )
        found = library(plan, table or (), budget=budget, page=page)
    if as_json:
        print_json(found.to_json())
        return
    say(f"{found.measured} cells measured, {found.remaining} to go; written to {found.page}")


app = command(study, MODULE, "--table quality --budget 30 --out runs/study")

if __name__ == "__main__":
    app(prog_name=called(MODULE))
