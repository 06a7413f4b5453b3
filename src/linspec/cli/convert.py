"""The verb `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import named
from linspec.cli.console import guarded, place_on, print_facts, print_json, quiet_stdout, say
from linspec.cli.options import Json, Overwrite, Threads


@guarded()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A model directory, a GGUF file, or a name such as smollm2."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="B",
            callback=named,
            help="What to write: for a directory A a file called *.gguf, for a GGUF file A a directory.",
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Numbers of a GGUF file: f16, q8_0 (half of that), q4_0 (a quarter), bf16 or f32.",
            show_default="f16",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Numbers of a directory: float32 (all values of the file), bfloat16 or float16.",
            show_default="float32",
        ),
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Turn a Hugging Face directory into a GGUF file for llama.cpp, or a GGUF file into a directory.

    The tokenizer and the chat template go along. Before anything is written linspec reads back what the
    other format would say; a setting or a tokenizer that it cannot say is an error, and so are linearized
    models, whose mixers no GGUF file has. Vectors stay float32; rows that make no whole blocks of 32 become
    f16; in q4_0 files the embedding and the output matrix are q8_0. Stopped, it leaves nothing.
    """
    from linspec.checkpoints.convert import convert as library

    place_on("cpu", threads)
    with quiet_stdout():
        done = library(source, out, kind=kind, dtype=dtype, overwrite=overwrite)
    print_json(done.to_json()) if as_json else print_facts(done.to_json())
    if not as_json:
        say(f"try it: linspec generate {out} --prompt 'Once upon a time'")
