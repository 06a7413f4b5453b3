"""The verbs `eval` and `verify`: how good a model is, and whether a drafter changes nothing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from linspec.cli.checks import whole
from linspec.cli.console import (
    guarded,
    numbers,
    place_on,
    print_facts,
    print_json,
    print_measured,
    quiet_stdout,
    sources,
)
from linspec.cli.options import Data, Device, DrafterName, Field, Json, Kv, Model, Quantize, Threads

Options = dict[str, Any]


@guarded()
def evaluate(
    model: Model,
    data: Data = None,
    field: Field = "text",
    limit_bytes: Annotated[
        int | None, typer.Option(callback=whole(), help="Stop after this much text.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Tokens of a window.", show_default="the model's"),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    quantize: Quantize = None,
    kv: Kv = "auto",
    recall: Annotated[
        bool, typer.Option("--recall", help="Measure recall from far above instead.")
    ] = False,
    repeats: Annotated[
        bool, typer.Option("--repeats", help="Measure what repeated passages gain instead.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="With --recall, --repeats: the model to compare with.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="With --recall, --repeats: tokens of the texts.")
    ] = "512,1024,2048,4096",
    samples: Annotated[
        int, typer.Option(callback=whole(), help="With --recall: texts of a kind and seed.")
    ] = 16,
    seeds: Annotated[int, typer.Option(callback=whole(), help="With --recall: seeds.")] = 1,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Measure perplexity along long texts instead.")
    ] = False,
    length: Annotated[
        int, typer.Option(callback=whole(), help="With --by-position: tokens of a text.")
    ] = 32768,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Bits per byte and perplexity on text; 'stdlib' means its held-out files."""
    from linspec.errors import ConfigError

    if recall + by_position + repeats > 1:
        raise ConfigError("give only one of --recall, --repeats and --by-position")
    common: Options = {
        "data": sources(data),
        "field": field,
        "device": place_on(device, threads),
    }
    compared = {"teacher": teacher, "lengths": numbers(lengths, "--lengths")}
    recalled = compared | {"samples": samples, "seeds": seeds}
    scored = {
        "limit_bytes": limit_bytes,
        "bf16": bf16,
        "quantize": quantize,
        "kv": kv,
        "context": context,
    }
    with quiet_stdout():
        if recall:
            found, rows = _recall(model, common | recalled), "cells"
        elif repeats:
            found, rows = _repeats(model, common | compared), "cells"
        elif by_position:
            places = {"length": length, "context": context}
            found, rows = _positions(model, common | places), "stretches"
        else:
            found, rows = _perplexity(model, common | scored), ""
    print_json(found) if as_json else print_measured(found, rows)


def _recall(model: str, options: Options) -> Options:
    from linspec.evaluate.recall import evaluate_recall

    return evaluate_recall(model, **options).to_json()


def _repeats(model: str, options: Options) -> Options:
    from linspec.evaluate.repeats import evaluate_repeats

    return evaluate_repeats(model, **options).to_json()


def _positions(model: str, options: Options) -> Options:
    from linspec.evaluate.positions import by_position

    return by_position(model, **options).to_json()


def _perplexity(model: str, options: Options) -> Options:
    from linspec.evaluate.perplexity import evaluate_source

    return evaluate_source(model, **options).to_json()


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
        _verify_files(model, as_json)
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
            data=sources(data),
            device=place,
            seed=seed,
            quantize=quantize,
            kv=kv,
        )
    print_json(report.to_json()) if as_json else print_facts(report.to_json())
    if not report.lossless_greedy:
        raise typer.Exit(1)


def _verify_files(model: str, as_json: bool) -> None:
    from linspec.evaluate.files import verify_files

    with quiet_stdout():
        found = verify_files(model).to_json()
    print_json(found) if as_json else print_facts(found)
