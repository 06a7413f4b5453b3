"""The verbs `bench` and `bench load`: how fast a model decodes, how soon it begins."""

from __future__ import annotations

from typing import Annotated

import typer

from linspec.cli.checks import whole
from linspec.cli.console import (
    guarded,
    numbers,
    place_on,
    print_facts,
    print_json,
    print_speed,
    quiet_stdout,
    sources,
)
from linspec.cli.options import Data, Device, Json, Kv, Model, Quantize, Threads


@guarded()
def bench(
    model: Model,
    contexts: Annotated[str, typer.Option(help="Tokens before decoding, by commas.")] = "128,1024",
    drafter: Annotated[
        list[str] | None, typer.Option(help="A drafter beside plain decoding; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(callback=whole(), help="Tokens decoded in a repeat.")] = 64,
    repeats: Annotated[
        int, typer.Option(callback=whole(), help="Repeats after a warm-up; the median counts.")
    ] = 5,
    policy: Annotated[str, typer.Option(help="auto, or a number of draft tokens.")] = "auto",
    data: Data = None,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="Measure the memory's speed too.")
    ] = False,
    quantize: Quantize = None,
    kv: Kv = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time decoding after long and short contexts, plain and with drafters, in one run."""
    from linspec.bench.speed import bench as library

    place = place_on(device, threads)
    with quiet_stdout():
        result = library(
            model,
            numbers(contexts, "--contexts"),
            drafter or (),
            tokens=tokens,
            repeats=repeats,
            policy=policy,
            data=sources(data),
            device=place,
            bandwidth=bandwidth,
            quantize=quantize,
            kv=kv,
        ).to_json()
    if as_json:
        print_json(result)
        return
    print_speed(result)


@guarded()
def bench_load(
    model: Model,
    tokens: Annotated[
        int, typer.Option(callback=whole(), help="Tokens that a process generates.")
    ] = 4,
    repeats: Annotated[
        int, typer.Option(callback=whole(), help="Processes of each kind; medians count.")
    ] = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time fresh processes from their start to the first output, cold and warm, with their memory."""
    from linspec.bench.load import bench_load as library

    with quiet_stdout():
        found = library(model, tokens=tokens, repeats=repeats, threads=threads).to_json()
    print_json(found) if as_json else print_facts(found)
