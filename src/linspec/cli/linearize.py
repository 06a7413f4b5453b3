"""The verb `linearize`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.checks import real, whole
from linspec.cli.console import (
    RESUME,
    guarded,
    numbers,
    place_on,
    quiet_stdout,
    report_written,
)
from linspec.cli.groups import grouped
from linspec.cli.options import Json, Model, Out, RecallShare, Run, Shards, Texts, Training, given
from linspec.errors import ConfigError

MixerName = Annotated[
    str | None,
    typer.Option(
        help="A mixer that linspec list shows; NAME:key=value,… sets sizes.", show_default="aug"
    ),
]
Group = Annotated[
    int | None,
    typer.Option(
        callback=whole(), help="Tokens per group.", show_default="64, or 32 for an encoder"
    ),
]
Taps = Annotated[
    int | None,
    typer.Option(
        callback=whole(0), help="Causal convolution taps.", show_default="32 for aug, else 0"
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        callback=whole(),
        help="Tokens that mixer 'window' sees, or with --exact-heads the other heads.",
        show_default="64, or 256 with --exact-heads",
    ),
]
Span = Annotated[
    str | None,
    typer.Option(
        help="Groups seen exactly, the open one included: 2, or one for each layer.",
        show_default="by --exact-tokens with kernel softmax",
    ),
]
ExactTokens = Annotated[
    int | None,
    typer.Option(
        callback=whole(),
        help="Tokens seen exactly, mean of the layers; each gets what it needs.",
        show_default="384",
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
    int | None,
    typer.Option(
        callback=whole(0), help="Of what performer and rfa draw at random.", show_default="0"
    ),
]
KeepSoftmax = Annotated[
    str | None,
    typer.Option(help="Layers that stay as they are, like 0,5; T5 counts its encoder's first."),
]
SoftmaxLayers = Annotated[
    int | None,
    typer.Option(
        callback=whole(0),
        help="How many more stay: those that need to see far most.",
        show_default="0",
    ),
]
ExactHeads = Annotated[
    str | None,
    typer.Option(
        help="Keep only these KV heads exact: 11, 12%, layers:0,7 or all-linear. Mixers go unasked.",
        show_default=False,
    ),
]
GateSteps = Annotated[
    int | None,
    typer.Option(callback=whole(), help="To find those heads, at most.", show_default="400"),
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


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Which mixer every layer gets; what is left out (None) keeps the default of the library."""

    mixer: MixerName = None
    group: Group = None
    taps: Taps = None
    window: Window = None
    span: Span = None
    exact_tokens: ExactTokens = None
    kernel: Kernel = None
    features: Features = None
    keep: Keep = None
    mixer_seed: MixerSeed = None
    keep_softmax: KeepSoftmax = None
    softmax_layers: SoftmaxLayers = None

    def given(self) -> dict[str, Any]:
        """As LinearizeRecipe takes them, without those that were left out."""
        spans = numbers(self.span or "", "--span")
        lists = {
            "span": spans[0] if len(spans) == 1 else tuple(spans) or None,
            "keep_softmax": tuple(numbers(self.keep_softmax or "", "--keep-softmax")),
        }
        return given(asdict(self) | lists)


@grouped
@guarded(RESUME)
def linearize(
    source: Model,
    out: Out,
    mixing: Mixing,
    texts: Texts,
    training: Training,
    run: Run,
    exact_heads: ExactHeads = None,
    gate_steps: GateSteps = None,
    transfer_share: TransferShare = None,
    kl_weight: KlWeight = None,
    recall_share: RecallShare = None,
    lora_rank: LoraRank = None,
    sequence_parallel: Shards = None,
    as_json: Json = False,
) -> None:
    """Replace a checkpoint's softmax attention by linear mixers and train it back to quality.

    A decoder, an encoder (BERT) or a T5. Of a T5, encoder and decoder are replaced, cross-attention
    stays, and it learns to write the second half of a window (--context) from the first. An encoder
    learns to imitate its own hidden states.
    """
    place_on("cpu", run.threads)
    if exact_heads is not None:
        _check_unasked(mixing, transfer_share, kl_weight, lora_rank, sequence_parallel)
        sizes = {
            "gate_steps": gate_steps,
            "recall_share": recall_share,
            "window": mixing.window,
        }
        _by_head(source, out, exact_heads, texts, {**training.given(), **given(sizes)}, run)
        report_written(out, as_json)
        return
    if gate_steps is not None:
        raise ConfigError(
            "--gate-steps finds the heads of --exact-heads; give that too, or leave it out"
        )
    from linspec.train.linearize import linearize as library
    from linspec.train.linearize_recipe import LinearizeRecipe

    further = {
        "transfer_share": transfer_share,
        "kl_weight": kl_weight,
        "recall_share": recall_share,
        "lora_rank": lora_rank,
        "sequence_parallel": sequence_parallel,
    }
    recipe = LinearizeRecipe.of(
        **mixing.given(), **texts.to_library(), **training.given(), **given(further)
    )
    with quiet_stdout():
        library(source, out, recipe, resume=run.resume, overwrite=run.overwrite)
    report_written(out, as_json)


def _check_unasked(mixing: Mixing, *shares: float | None) -> None:
    """Raise ConfigError for options that exact heads leave unasked."""
    if mixing != Mixing(window=mixing.window) or any(share is not None for share in shares):
        raise ConfigError(
            "--exact-heads says which mixers all layers get and how they are trained; of the options "
            "of mixers only --window goes with it. Leave out the others, --transfer-share, --kl-weight, "
            "--lora-rank and --sequence-parallel, or leave out --exact-heads"
        )


def _by_head(
    source: str, out: Path, exact: str, texts: Texts, settings: dict[str, Any], run: Run
) -> None:
    from linspec.train.linearize_heads import HeadsConfig, linearize_heads

    with quiet_stdout():
        linearize_heads(
            source,
            out,
            exact=exact,
            config=HeadsConfig(**settings),
            **texts.to_library(),
            resume=run.resume,
            overwrite=run.overwrite,
        )
