"""The verb `verify`: whether a drafter changes nothing, and whether files are whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from linspec.cli.checks import whole
from linspec.cli.console import guarded, place_on, print_facts, print_json, quiet_stdout
from linspec.cli.options import Data, Device, DrafterName, Json, Kv, Model, Quantize, Threads


@guarded()
def verify(
    model: Model,
    drafter: DrafterName = "none",
    prompts: Annotated[
        int, typer.Option(callback=whole(), help="Prompts, from held-out text.")
    ] = 64,
    tokens: Annotated[int, typer.Option(callback=whole(), help="New tokens of each.")] = 128,
    draws: Annotated[
        int, typer.Option(callback=whole(0), help="Samples for the test of the distribution.")
    ] = 2000,
    policy: Annotated[str, typer.Option(help="Number of draft tokens, or auto.")] = "12",
    data: Data = None,
    seed: Annotated[int, typer.Option(callback=whole(0), help="Choice of the prompts.")] = 0,
    quantize: Quantize = None,
    kv: Kv = "auto",
    files: Annotated[
        bool, typer.Option("--files", help="Read all files instead: checksums, every value.")
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check that a drafter changes nothing: greedy token for token, samples by a chi-square test.

    Exits with 1 when greedy output differs by more than near ties (logits closer than 1e-4), and with
    --files when a file of the model or of a drafter in it is damaged.
    """
    if files:
        from linspec.evaluate.files import verify_files

        with quiet_stdout():
            found = verify_files(model).to_json()
        _show(found, as_json)
        return
    from linspec.evaluate.lossless import verify as library

    place = place_on(device, threads)
    with quiet_stdout():
        report = library(
            model,
            drafter,
            prompts=prompts,
            tokens=tokens,
            draws=draws,
            policy=policy,
            data=data or ["stdlib"],
            device=place,
            seed=seed,
            quantize=quantize,
            kv=kv,
        )
    _show(report.to_json(), as_json)
    if not report.lossless_greedy:
        raise typer.Exit(1)


def _show(found: dict[str, Any], as_json: bool) -> None:
    print_json(found) if as_json else print_facts(found)
