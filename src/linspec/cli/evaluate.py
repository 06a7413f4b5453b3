"""The verbs `eval …`: how good a model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from linspec.cli.checks import whole
from linspec.cli.console import (
    guarded,
    numbers,
    place_on,
    print_json,
    print_measured,
    quiet_stdout,
)
from linspec.cli.groups import grouped
from linspec.cli.options import Device, Json, Kv, Model, Quantize, Texts, Threads

LimitBytes = Annotated[
    int | None, typer.Option(callback=whole(), help="Stop after this much text.")
]
Window = Annotated[
    int | None,
    typer.Option(callback=whole(), help="Tokens of a window.", show_default="the model's"),
]
Teacher = Annotated[str | None, typer.Option(help="A model to compare with, on the same texts.")]
Lengths = Annotated[str, typer.Option(help="Tokens of the texts, by commas.")]


@grouped
@guarded()
def perplexity(
    model: Model,
    texts: Texts,
    limit_bytes: LimitBytes = None,
    context: Window = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    quantize: Quantize = None,
    kv: Kv = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Bits per byte and perplexity on text; 'stdlib' means its held-out files."""
    from linspec.evaluate.perplexity import evaluate_source

    place = place_on(device, threads)
    _show(
        lambda: evaluate_source(
            model,
            **texts.to_library(),
            limit_bytes=limit_bytes,
            context=context,
            bf16=bf16,
            quantize=quantize,
            kv=kv,
            device=place,
        ),
        as_json,
    )


@grouped
@guarded()
def recall(
    model: Model,
    texts: Texts,
    teacher: Teacher = None,
    lengths: Lengths = "512,1024,2048,4096",
    samples: Annotated[
        int, typer.Option(callback=whole(), help="Texts of a kind, length and seed.")
    ] = 16,
    seeds: Annotated[int, typer.Option(callback=whole(), help="Seeds of what is asked.")] = 1,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """How much of what a text said once the model repeats, by length and distance."""
    from linspec.evaluate.recall import evaluate_recall

    place, sizes = place_on(device, threads), numbers(lengths, "--lengths")
    _show(
        lambda: evaluate_recall(
            model,
            teacher=teacher,
            **texts.to_library(),
            lengths=sizes,
            samples=samples,
            seeds=seeds,
            device=place,
        ),
        as_json,
        "cells",
    )


@grouped
@guarded()
def repeats(
    model: Model,
    texts: Texts,
    teacher: Teacher = None,
    lengths: Lengths = "512,1024,2048,4096",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """What a model gains on a passage that it reads a second time, at the end of a long text."""
    from linspec.evaluate.repeats import evaluate_repeats

    place, sizes = place_on(device, threads), numbers(lengths, "--lengths")
    _show(
        lambda: evaluate_repeats(
            model, teacher=teacher, **texts.to_library(), lengths=sizes, device=place
        ),
        as_json,
        "cells",
    )


@grouped
@guarded()
def positions(
    model: Model,
    texts: Texts,
    length: Annotated[int, typer.Option(callback=whole(), help="Tokens of a text.")] = 32768,
    context: Window = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity along long texts, beside that in windows of the training context."""
    from linspec.evaluate.positions import by_position

    place = place_on(device, threads)
    _show(
        lambda: by_position(
            model, **texts.to_library(), length=length, context=context, device=place
        ),
        as_json,
        "stretches",
    )


@grouped
@guarded()
def continuations(
    model: Model,
    texts: Texts,
    limit_bytes: LimitBytes = None,
    context: Annotated[
        int, typer.Option(callback=whole(2), help="Tokens of a window, source and target.")
    ] = 512,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Bits per byte of an encoder-decoder (T5): the second half of every window, given the first."""
    from linspec.evaluate.continuations import continue_source

    place = place_on(device, threads)
    _show(
        lambda: continue_source(
            model, **texts.to_library(), limit_bytes=limit_bytes, context=context, device=place
        ),
        as_json,
    )


@grouped
@guarded()
def embeddings(
    teacher: Annotated[str, typer.Argument(help="Directory of the original encoder.")],
    student: Annotated[str, typer.Argument(help="Directory of the linearized encoder.")],
    texts: Texts,
    count: Annotated[
        int,
        typer.Option("--texts", callback=whole(3), help="Most texts, from the held-out part."),
    ] = 300,
    context: Annotated[int, typer.Option(callback=whole(), help="Most tokens of a text.")] = 256,
    quantize: Annotated[
        int | None, typer.Option(help="Turn STUDENT's weights into 8 or 4 bits.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """How close an encoder's sentence embeddings (BERT) are to those of the one it was made from."""
    from linspec.evaluate.embeddings import compare_sources

    place_on("cpu", threads)
    _show(
        lambda: compare_sources(
            teacher,
            student,
            **texts.to_library(),
            count=count,
            context=context,
            quantize=quantize,
        ),
        as_json,
    )


def _show(measure: Callable[[], Any], as_json: bool, rows: str = "") -> None:
    """Measure and print; rows: the list of the result that people see as a table."""
    with quiet_stdout():
        found = measure().to_json()
    print_json(found) if as_json else print_measured(found, rows)
