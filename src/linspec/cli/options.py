"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import cache_dtype, named, real, sources, whole

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
    typer.Option(
        help="none, NAME or NAME:key=value,… of linspec list, such as medusa or medusa:DIR."
    ),
]
Quantize = Annotated[
    int | None, typer.Option(help="Turn the weights into 8 or 4 bits as they are loaded.")
]
Kv = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        # its name in 0.1.0
        "--kv",
        callback=cache_dtype,
        help="How softmax caches are kept: auto (as the model computes), float32 or int8.",
    ),
]
MaxTokens = Annotated[int, typer.Option(callback=whole(), help="Most tokens to add.")]
MinTokens = Annotated[
    int, typer.Option(callback=whole(0), help="Tokens before the output may end.")
]
Temperature = Annotated[
    float, typer.Option(callback=real(least=0), help="0 takes the likeliest token.")
]
TopK = Annotated[int, typer.Option(callback=whole(0), help="Sample among k tokens; 0 is all.")]
TopP = Annotated[
    float, typer.Option(callback=real(above=0, most=1), help="Sample among this mass.")
]
MinP = Annotated[
    float,
    typer.Option(
        callback=real(least=0, most=1), help="Sample what is this many times as likely as the best."
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(callback=real(above=0), help="Above 1 repeats less.")
]
PresencePenalty = Annotated[
    float, typer.Option(callback=real(least=-2, most=2), help="Taken from tokens of the output.")
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(callback=real(least=-2, most=2), help="The same, each time that they occur."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        callback=whole(0, 2**64 - 1), help="Equal seeds, equal text.", show_default="random"
    ),
]
PolicyName = Annotated[str, typer.Option(help="auto, or a number of draft tokens.")]
VerifierName = Annotated[str, typer.Option(help="lossless, greedy or typical (lossy).")]
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
