"""The verb `calibrate`."""

from __future__ import annotations

from typing import Annotated

import typer

from linspec.cli.checks import real, whole
from linspec.cli.console import RESUME, guarded, place_on, print_json, quiet_stdout, say
from linspec.cli.groups import grouped
from linspec.cli.options import BatchTokens, Context, Json, Model, Order, Rate, Run, Texts, given


@grouped
@guarded(RESUME)
def calibrate(
    model: Model,
    attention: Annotated[
        str, typer.Option(help="lserve:budget=1024, with exact=22 or exact=12% for how many heads.")
    ],
    texts: Texts,
    run: Run,
    steps: Annotated[
        int | None, typer.Option(callback=whole(), help="At most.", show_default="400")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(callback=real(above=0), help="At most; the gates are taken as they are then."),
    ] = None,
    context: Context = None,
    batch_tokens: BatchTokens = None,
    lr: Rate = None,
    seed: Order = None,
    as_json: Json = False,
) -> None:
    """Find the KV heads that recall, once, for --attention lserve; other attention needs no such thing.

    Trains one gate for each KV head on sentences hidden in text (DuoAttention); weights stay as they are. The
    result lies in MODEL/calibration, or in linspec's cache directory where MODEL is a file or comes with a
    package, and every verb finds it there. Stopped, it goes on with --resume.
    """
    from linspec.train.calibrate import CalibrateConfig
    from linspec.train.calibrate import calibrate as library

    place_on("cpu", run.threads)
    settings = {
        "steps": steps,
        "seconds": seconds,
        "context": context,
        "batch_tokens": batch_tokens,
        "lr": lr,
        "seed": seed,
    }
    with quiet_stdout():
        report = library(
            model,
            attention,
            **texts.to_library(),
            config=CalibrateConfig(**given(settings)),
            resume=run.resume,
            overwrite=run.overwrite,
        )
    if as_json:
        print_json(report.to_json())
        return
    print(f"{sum(map(len, report.heads))} exact KV heads, layer by layer: {report.heads}")
    if not report.reached:
        say(f"the gates had not closed after {report.steps} steps: the widest open ones were taken")
    say(f"written to {report.out}")
