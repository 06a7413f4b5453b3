"""The verbs `pretrain` and `train-drafter`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from linspec.cli.checks import named, real, whole
from linspec.cli.checks import sources as named_sources
from linspec.cli.console import RESUME, guarded, place_on, quiet_stdout, report_written, say
from linspec.cli.groups import grouped
from linspec.cli.options import (
    Compile,
    Json,
    Model,
    Out,
    Precision,
    Run,
    Shards,
    Texts,
    Training,
    given,
)
from linspec.errors import ConfigError

if TYPE_CHECKING:
    from linspec.train.answers import AnswersConfig


@dataclass(frozen=True, kw_only=True)
class DrafterTraining(Training):
    """How long and how to train a drafter."""

    # those of DrafterConfig, whose import takes seconds
    usual: ClassVar = {
        "tokens": "3000000",
        "context": "512",
        "batch_tokens": "4096",
        "lr": "the kind's",
        "seed": "0",
    }


@dataclass(frozen=True, kw_only=True)
class OwnAnswers:
    """Which prompts the model answers first, to learn from its answers in place of the texts."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Train on the model's own answers to the prompts of this file (JSON lines with turns or "
            "prompt), made first and kept.",
        ),
    ] = None
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            callback=whole(),
            help="Most tokens of an answer; without --prompts, prompts are cut from the texts.",
            show_default="128",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            callback=real(least=0), help="Of answers; 0 takes the likeliest.", show_default="0"
        ),
    ] = None

    def to_library(self, texts: Texts, seed: int | None) -> AnswersConfig | None:
        """As `train_drafter` takes them; None where the texts themselves are learned."""
        from linspec.train.answers import AnswersConfig

        if self.prompts is None and self.answer_tokens is None:
            if self.temperature is not None:
                raise ConfigError(
                    "--temperature is that of the model's own answers; give --prompts or --answer-tokens too"
                )
            return None
        if self.prompts is not None and texts.data:
            raise ConfigError("prompts come from --prompts or from --data; give one of the two")
        asked = {"tokens": self.answer_tokens, "temperature": self.temperature, "seed": seed}
        return AnswersConfig(prompts=self.prompts, **given(asked))


@dataclass(frozen=True, kw_only=True)
class IntoDiffusion:
    """A decoder that becomes a masked-diffusion model, and how."""

    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Turn this decoder into a masked-diffusion model, in place of a recipe; of smollm2 a delta.",
            show_default="a recipe",
        ),
    ] = None
    rank: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Of the change of each matrix.", show_default="16"),
    ] = None
    mask: Annotated[
        str | None,
        typer.Option(
            help="The token that becomes the mask.", show_default="a special one that is free"
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Tokens of a window.", show_default="256"),
    ] = None

    def given(self) -> dict[str, Any]:
        """What was said of how; raises ConfigError without a decoder."""
        asked = given({"rank": self.rank, "mask": self.mask, "context": self.context})
        if asked and self.source is None:
            raise ConfigError(
                f"--{next(iter(asked))} is for a decoder that becomes a masked-diffusion model; give --from "
                "MODEL too"
            )
        return asked


@grouped
@guarded(RESUME)
def pretrain(
    out: Out,
    run: Run,
    diffusion: IntoDiffusion,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="embedded, recall, embedded-diffusion, flash-aug or flash-quadratic.",
            show_default="embedded",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            callback=named_sources,
            help="stdlib, a file or a folder; repeatable.",
            show_default="stdlib",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(callback=whole(), help="Optimizer steps.", show_default="the recipe's"),
    ] = None,
    compile: Compile = "auto",
    precision: Precision = "auto",
    sequence_parallel: Shards = None,
    as_json: Json = False,
) -> None:
    """Train a small model, or turn a decoder into a masked-diffusion model."""
    asked = diffusion.given()
    if diffusion.source is not None:
        if recipe is not None or sequence_parallel is not None:
            raise ConfigError(
                "--from takes the place of a recipe; leave out --recipe and --sequence-parallel"
            )
        from linspec.train.into_diffusion import DiffusionTraining, into_diffusion

        place_on("cpu", run.threads)
        with quiet_stdout():
            into_diffusion(
                diffusion.source,
                out,
                data=data or "stdlib",
                config=DiffusionTraining(**asked, precision=precision, **given({"steps": steps})),
                resume=run.resume,
                overwrite=run.overwrite,
            )
        report_written(out, as_json)
        return
    from linspec.train import pretrain as library

    place_on("cpu", run.threads)
    with quiet_stdout():
        library.pretrain(
            out,
            recipe=recipe or "embedded",
            data=data or (),
            resume=run.resume,
            steps=steps,
            overwrite=run.overwrite,
            compile=compile,
            precision=precision,
            sequence_parallel=sequence_parallel or 1,
        )
    report_written(out, as_json)


@grouped
@guarded(RESUME)
def train_drafter(
    model: Model,
    texts: Texts,
    answers: OwnAnswers,
    training: DrafterTraining,
    run: Run,
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of drafter and its shape, such as medusa:heads=4,vocabulary=8192; "
            "`linspec list` has all."
        ),
    ] = "medusa",
    out: Annotated[
        Path | None,
        typer.Option(callback=named, help="Where it goes.", show_default="MODEL/KIND"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a drafter for a model, whose own weights stay as they are, and measure it on text kept aside.

    The measurement at the end takes seconds and is done again by a run that is resumed.
    """
    from linspec.train.drafters import DrafterConfig, predicted
    from linspec.train.drafters import train_drafter as library

    place_on("cpu", run.threads)
    config = DrafterConfig(**training.given())
    own = answers.to_library(texts, training.seed)
    with quiet_stdout():
        written = library(
            model,
            out,
            kind=kind,
            **texts.to_library(),
            config=config,
            answers=own,
            resume=run.resume,
            overwrite=run.overwrite,
        )
    found = predicted(written)
    report_written(written, as_json, found.to_json() if found else {})
    if found and not as_json:
        say(str(found))
