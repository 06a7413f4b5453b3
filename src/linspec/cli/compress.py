"""The verb `quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from linspec.cli.checks import whole
from linspec.cli.console import guarded, place_on, print_facts, print_json, quiet_stdout, say
from linspec.cli.groups import grouped
from linspec.cli.options import Json, Model, Out, Overwrite, Texts, Threads


@grouped
@guarded()
def quantize(
    model: Model,
    out: Out,
    texts: Texts,
    bits: Annotated[int, typer.Option(help="Bits of a weight, 8 or 4.")] = 8,
    calibration_bytes: Annotated[
        int,
        typer.Option(
            callback=whole(0), help="Text that 4-bit weights are fitted to; 0 fits to none."
        ),
    ] = 200_000,
    limit_bytes: Annotated[
        int, typer.Option(callback=whole(), help="Held-out text for the quality.")
    ] = 100_000,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Turn a model's weights into 8- or 4-bit integers for the CPU, and say what quality that costs.

    Takes minutes at most and is not resumed: stopped, it leaves nothing, and the same command begins again.
    """
    from linspec.evaluate.quantize import quantize as library

    place_on("cpu", threads)
    with quiet_stdout():
        report = library(
            model,
            out,
            bits=bits,
            **texts.to_library(),
            calibration_bytes=calibration_bytes,
            limit_bytes=limit_bytes,
            overwrite=overwrite,
        )
    print_json(report.to_json()) if as_json else print_facts(report.to_json())
    say(f"written to {out}")
