"""The verbs `pretrain` and `train-drafter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import named, whole
from linspec.cli.checks import sources as named_sources
from linspec.cli.console import (
    RESUME,
    configure,
    guarded,
    place_on,
    quiet_stdout,
    report_written,
    sources,
)
from linspec.cli.options import (
    BatchTokens,
    Compile,
    Context,
    Data,
    Field,
    Json,
    Model,
    Order,
    Out,
    Overwrite,
    Rate,
    Resume,
    Threads,
    Tokens,
)


@guarded(RESUME)
def pretrain(
    out: Out,
    recipe: Annotated[
        str, typer.Option(help="embedded, recall, flash-aug or flash-quadratic.")
    ] = "embedded",
    data: Annotated[
        list[str] | None,
        typer.Option(
            callback=named_sources,
            help="stdlib, a file or a folder; repeatable.",
            show_default="stdlib",
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    steps: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Optimizer steps.", show_default="the recipe's"),
    ] = None,
    compile: Compile = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small softmax model: from nothing, or the embedded one on, to recall from far above."""
    from linspec.train import pretrain as library

    place_on("cpu", threads)
    with quiet_stdout():
        library.pretrain(
            out,
            recipe=recipe,
            data=data or (),
            resume=resume,
            steps=steps,
            overwrite=overwrite,
            compile=compile,
        )
    report_written(out, as_json)


@guarded(RESUME)
def train_drafter(
    model: Model,
    kind: Annotated[str, typer.Option(help="Kind of drafter.")] = "medusa",
    out: Annotated[
        Path | None,
        typer.Option(callback=named, help="Where it goes.", show_default="MODEL/medusa"),
    ] = None,
    heads: Annotated[int | None, typer.Option(callback=whole(), help="Medusa heads.")] = None,
    data: Data = None,
    field: Field = "text",
    tokens: Tokens = None,
    context: Context = None,
    batch_tokens: BatchTokens = None,
    lr: Rate = None,
    seed: Order = None,
    compile: Compile = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train and calibrate heads that draft for a model; its own weights stay as they are."""
    from linspec.train.drafter import DrafterConfig
    from linspec.train.drafter import train_drafter as library

    place_on("cpu", threads)
    config = configure(DrafterConfig, locals())
    with quiet_stdout():
        written = library(
            model,
            out,
            kind=kind,
            data=sources(data),
            field=field,
            config=config,
            resume=resume,
            overwrite=overwrite,
        )
    report_written(written, as_json)
