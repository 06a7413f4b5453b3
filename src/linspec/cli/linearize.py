"""The verb `linearize`."""

from __future__ import annotations

from typing import Annotated

import typer

from linspec.cli.checks import real, whole
from linspec.cli.console import (
    RESUME,
    configure,
    guarded,
    numbers,
    place_on,
    quiet_stdout,
    report_written,
    sources,
)
from linspec.cli.options import (
    BatchTokens,
    Compile,
    Context,
    Data,
    Field,
    Json,
    Model,
    Order,
    Out,
    Overwrite,
    Rate,
    RecallShare,
    Resume,
    Threads,
    Tokens,
)

Group = Annotated[int, typer.Option(callback=whole(), help="Tokens per group.")]
Taps = Annotated[
    int | None,
    typer.Option(
        callback=whole(0), help="Causal convolution taps.", show_default="32 for aug, else 0"
    ),
]
Window = Annotated[
    int | None, typer.Option(callback=whole(), help="Tokens of mixer 'window'.", show_default="64")
]
Span = Annotated[
    str,
    typer.Option(
        help="Groups seen exactly, the open one included: 2, or one for each layer.",
        show_default="by --rows with kernel softmax",
    ),
]
Rows = Annotated[
    int,
    typer.Option(
        callback=whole(), help="Tokens seen exactly, mean of the layers; each gets what it needs."
    ),
]
Kernel = Annotated[
    str | None,
    typer.Option(
        help="Weights of tokens seen exactly: own, softmax or relu2.",
        show_default="softmax for local, grouped, aug, gla, gdn",
    ),
]
Features = Annotated[
    int | None,
    typer.Option(
        callback=whole(),
        help="Random features of performer and rfa; rows that linformer makes of a group.",
        show_default="d·ln d for head width d; an eighth of the group",
    ),
]
Keep = Annotated[
    int | None,
    typer.Option(
        callback=whole(), help="Closed groups that linformer remembers.", show_default="16"
    ),
]
MixerSeed = Annotated[
    int, typer.Option(callback=whole(0), help="Of what performer and rfa draw at random.")
]
KeepSoftmax = Annotated[
    str,
    typer.Option(help="Layers that stay as they are, like 0,5; T5 counts its encoder's first."),
]
SoftmaxLayers = Annotated[
    int,
    typer.Option(callback=whole(0), help="How many more stay: those that need to see far most."),
]
TransferShare = Annotated[
    float | None,
    typer.Option(
        callback=real(least=0, most=1),
        help="Share of them that matches the teacher by layer.",
        show_default="0.4, or 0 with kernel softmax",
    ),
]
KlWeight = Annotated[
    float | None, typer.Option(callback=real(least=0), help="Weight of the KL to the teacher.")
]
LoraRank = Annotated[int | None, typer.Option(callback=whole(0), help="0 trains all weights.")]


@guarded(RESUME)
def linearize(
    source: Model,
    out: Out,
    mixer: Annotated[
        str, typer.Option(help="A mixer that linspec list shows; NAME:key=value,… sets sizes.")
    ] = "aug",
    group: Group = 64,
    taps: Taps = None,
    window: Window = None,
    span: Span = "",
    rows: Rows = 384,
    kernel: Kernel = None,
    features: Features = None,
    keep: Keep = None,
    mixer_seed: MixerSeed = 0,
    keep_softmax: KeepSoftmax = "",
    softmax_layers: SoftmaxLayers = 0,
    data: Data = None,
    field: Field = "text",
    tokens: Tokens = None,
    transfer_share: TransferShare = None,
    context: Context = None,
    batch_tokens: BatchTokens = None,
    lr: Rate = None,
    kl_weight: KlWeight = None,
    recall_share: RecallShare = None,
    lora_rank: LoraRank = None,
    seed: Order = None,
    compile: Compile = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Replace a checkpoint's softmax attention by linear mixers and train it back to quality.

    A decoder or a T5: of that, encoder and decoder are replaced, cross-attention stays, and it learns
    to write the second half of a window (--context) from the first.
    """
    from linspec.train.linearize import linearize as library
    from linspec.train.linearize_config import LinearizeConfig

    place_on("cpu", threads)
    config = configure(LinearizeConfig, locals())
    chosen = numbers(span, "--span")
    with quiet_stdout():
        library(
            source,
            out,
            mixer=mixer,
            group=group,
            taps=taps,
            window=window,
            span=chosen[0] if len(chosen) == 1 else chosen or None,
            rows=rows,
            kernel=kernel,
            features=features or 0,
            keep=keep or 0,
            mixer_seed=mixer_seed,
            keep_softmax=numbers(keep_softmax, "--keep-softmax"),
            softmax_layers=softmax_layers,
            data=sources(data),
            field=field,
            config=config,
            resume=resume,
            overwrite=overwrite,
        )
    report_written(out, as_json)
