"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import named, real, sources, whole

Model = Annotated[
    str, typer.Argument(help="A directory, a GGUF file, embedded-softmax, embedded-aug or smollm2.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Threads = Annotated[
    int | None,
    typer.Option(
        callback=whole(), help="CPU threads.", envvar="LINSPEC_THREADS", show_default="all"
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
DrafterName = Annotated[
    str,
    typer.Option(help="none, prompt-lookup, medusa[:DIR], draft-model:DIR or student[:DIR]."),
]
Quantize = Annotated[
    int | None, typer.Option(help="Turn the weights into 8 or 4 bits as they are loaded.")
]
Kv = Annotated[str, typer.Option(help="How softmax caches are kept: float or int8.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        callback=sources,
        help="stdlib, a text file, a folder, a .jsonl file or a datasets directory.",
    ),
]
Field = Annotated[str, typer.Option(help="Where the text is in .jsonl and datasets.")]
Tokens = Annotated[int | None, typer.Option(callback=whole(), help="Training tokens.")]
Context = Annotated[int | None, typer.Option(callback=whole(), help="Tokens of a window.")]
BatchTokens = Annotated[int | None, typer.Option(callback=whole(), help="Tokens of a step.")]
Rate = Annotated[float | None, typer.Option(callback=real(above=0), help="Learning rate.")]
RecallShare = Annotated[
    float | None,
    typer.Option(
        callback=real(least=0, most=1),
        help="Share of the windows that ask for what stood far above.",
    ),
]
Compile = Annotated[
    str,
    typer.Option(
        help="Compile the training step: auto (where it pays), on or off. The result is the same."
    ),
]
Order = Annotated[int | None, typer.Option("--seed", callback=whole(0), help="Order of the data.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last saved state in the output.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the same command wrote there before.")
]
Out = Annotated[Path, typer.Option(callback=named, help="Model directory to write.")]
