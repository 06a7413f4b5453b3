"""The verbs `pretrain` and `train-drafter`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from linspec.cli.checks import named, whole
from linspec.cli.checks import sources as named_sources
from linspec.cli.console import RESUME, guarded, place_on, quiet_stdout, report_written, say
from linspec.cli.groups import grouped
from linspec.cli.options import Compile, Json, Model, Out, Run, Texts, Training


@dataclass(frozen=True, kw_only=True)
class DrafterTraining(Training):
    """How long and how to train a drafter."""

    # those of DrafterConfig, whose import takes seconds
    usual: ClassVar = {
        "tokens": "3000000",
        "context": "512",
        "batch_tokens": "4096",
        "lr": "the kind's",
        "seed": "0",
    }


@grouped
@guarded(RESUME)
def pretrain(
    out: Out,
    run: Run,
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
    steps: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Optimizer steps.", show_default="the recipe's"),
    ] = None,
    compile: Compile = "auto",
    as_json: Json = False,
) -> None:
    """Train a small softmax model: from nothing, or the embedded one on, to recall from far above."""
    from linspec.train import pretrain as library

    place_on("cpu", run.threads)
    with quiet_stdout():
        library.pretrain(
            out,
            recipe=recipe,
            data=data or (),
            resume=run.resume,
            steps=steps,
            overwrite=run.overwrite,
            compile=compile,
        )
    report_written(out, as_json)


@grouped
@guarded(RESUME)
def train_drafter(
    model: Model,
    texts: Texts,
    training: DrafterTraining,
    run: Run,
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of drafter and its shape, such as medusa:heads=4,vocabulary=8192; "
            "`linspec list` has all."
        ),
    ] = "medusa",
    out: Annotated[
        Path | None,
        typer.Option(callback=named, help="Where it goes.", show_default="MODEL/KIND"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a drafter for a model, whose own weights stay as they are, and measure it on text kept aside.

    The measurement at the end takes seconds and is done again by a run that is resumed.
    """
    from linspec.train.drafters import DrafterConfig, predicted
    from linspec.train.drafters import train_drafter as library

    place_on("cpu", run.threads)
    config = DrafterConfig(**training.given())
    with quiet_stdout():
        written = library(
            model,
            out,
            kind=kind,
            **texts.to_library(),
            config=config,
            resume=run.resume,
            overwrite=run.overwrite,
        )
    found = predicted(written)
    report_written(written, as_json, found.to_json() if found else {})
    if found and not as_json:
        say(str(found))
