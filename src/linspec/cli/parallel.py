"""The verb `train-parallel`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.checks import named, real, whole
from linspec.cli.console import RESUME, guarded, place_on, quiet_stdout, report_written
from linspec.cli.groups import grouped
from linspec.cli.options import Json, Model, Order, Out, Rate, Run, given


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; what is left out (None) keeps the default of the library."""

    tokens: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Masks of an answer.", show_default="128"),
    ] = None
    block: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Of the decoder.", show_default="32"),
    ] = None
    weight: Annotated[
        float | None,
        typer.Option(callback=real(least=0), help="Of the entropy.", show_default="2"),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Optimizer steps.", show_default="1000"),
    ] = None
    rows: Annotated[
        int | None,
        typer.Option("--answers", callback=whole(), help="Answers of a step.", show_default="8"),
    ] = None
    rank: Annotated[
        int | None,
        typer.Option(
            callback=whole(0), help="Of the change; 0 trains all weights.", show_default="0"
        ),
    ] = None
    lr: Rate = None
    seed: Order = None

    def given(self) -> dict[str, Any]:
        """Those that the user gave."""
        return given(asdict(self))


@grouped
@guarded(RESUME)
def train_parallel(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            callback=named, help="JSON lines with turns or prompt; the model answers them first."
        ),
    ],
    out: Out,
    settings: Settings,
    run: Run,
    as_json: Json = False,
) -> None:
    """Train a copy of a masked-diffusion model on its own answers, to be sure of many tokens at once."""
    from linspec.train.parallel import ParallelConfig, read_asked
    from linspec.train.parallel import train_parallel as library

    place_on("cpu", run.threads)
    config = ParallelConfig(**settings.given())
    with quiet_stdout():
        asked = read_asked(model, prompts, config)
        written = library(model, out, asked, config, resume=run.resume, overwrite=run.overwrite)
    report_written(written, as_json)
