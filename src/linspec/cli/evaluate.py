"""The verbs `eval …`: how good a model is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.checks import real, whole
from linspec.cli.console import (
    guarded,
    numbers,
    place_on,
    print_json,
    print_measured,
    quiet_stdout,
    words,
)
from linspec.cli.groups import grouped
from linspec.cli.options import (
    AttentionName,
    Computing,
    DrafterName,
    Json,
    Loading,
    Model,
    Texts,
    Threads,
)
from linspec.errors import ConfigError

LimitBytes = Annotated[
    int | None, typer.Option(callback=whole(), help="Stop after this much text.")
]
Window = Annotated[
    int | None,
    typer.Option(callback=whole(), help="Tokens of a window.", show_default="the model's"),
]


@dataclass(frozen=True, kw_only=True)
class Repeating:
    """What is read twice, and who else reads it."""

    teacher: Annotated[
        str | None, typer.Option(help="A model to compare with, on the same texts.")
    ] = None
    lengths: Annotated[str, typer.Option(help="Tokens of the texts, by commas.")] = (
        "512,1024,2048,4096"
    )
    attention: AttentionName = None

    def to_library(self) -> dict[str, Any]:
        """As functions of the library take it."""
        return {
            "teacher": self.teacher,
            "lengths": numbers(self.lengths, "--lengths"),
            "attention": self.attention,
        }


@grouped
@guarded()
def perplexity(
    model: Model,
    *,
    texts: Texts,
    limit_bytes: LimitBytes = None,
    context: Window = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            callback=whole(2), help="Masks of a window, for a diffusion model.", show_default="4"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(callback=whole(0), help="Choice of these masks.")] = 0,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Bits per byte and perplexity on text; 'stdlib' means its held-out files.

    Of a masked-diffusion model it is an upper bound, by random masks, with its standard error.
    """
    from linspec.evaluate.perplexity import evaluate_source

    _show(
        evaluate_source,
        as_json,
        model=model,
        **texts.to_library(),
        limit_bytes=limit_bytes,
        context=context,
        bf16=bf16,
        samples=samples,
        seed=seed,
        **loading.to_library(),
    )


@grouped
@guarded()
def recall(
    model: Model,
    *,
    texts: Texts,
    repeating: Repeating,
    samples: Annotated[
        int, typer.Option(callback=whole(), help="Texts of a kind, length and seed.")
    ] = 16,
    seeds: Annotated[int, typer.Option(callback=whole(), help="Seeds of what is asked.")] = 1,
    computing: Computing,
    as_json: Json = False,
) -> None:
    """How much of what a text said once the model repeats, by length and distance."""
    from linspec.evaluate.recall import evaluate_recall

    _show(
        evaluate_recall,
        as_json,
        "cells",
        model=model,
        **texts.to_library(),
        **computing.to_library(),
        **repeating.to_library(),
        samples=samples,
        seeds=seeds,
    )


@grouped
@guarded()
def ruler(
    model: Model,
    *,
    texts: Texts,
    tasks: Annotated[
        str, typer.Option(help="Names by commas.", show_default="variables,common-words,…")
    ] = "",
    lengths: Annotated[
        str, typer.Option(help="Tokens of text and answer, by commas.")
    ] = "1024,2048,4096",
    samples: Annotated[
        int, typer.Option(callback=whole(), help="Questions of a task and length.")
    ] = 10,
    seed: Annotated[int, typer.Option(callback=whole(0), help="Of the questions.")] = 0,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Tasks of RULER in long texts: variables that hold a value, common words, frequent words.

    Scores are shares of the words that a greedy answer must have.
    """
    from linspec.evaluate.ruler import evaluate_ruler
    from linspec.evaluate.ruler_tasks import TASKS

    _show(
        evaluate_ruler,
        as_json,
        "cells",
        model=model,
        **texts.to_library(),
        tasks=words(tasks) or tuple(TASKS),
        lengths=numbers(lengths, "--lengths"),
        samples=samples,
        seed=seed,
        **loading.to_library(),
    )


@grouped
@guarded()
def repeats(
    model: Model,
    *,
    texts: Texts,
    repeating: Repeating,
    computing: Computing,
    as_json: Json = False,
) -> None:
    """What a model gains on a passage that it reads a second time, at the end of a long text."""
    from linspec.evaluate.repeats import evaluate_repeats

    _show(
        evaluate_repeats,
        as_json,
        "cells",
        model=model,
        **texts.to_library(),
        **computing.to_library(),
        **repeating.to_library(),
    )


@grouped
@guarded()
def positions(
    model: Model,
    *,
    texts: Texts,
    length: Annotated[int, typer.Option(callback=whole(), help="Tokens of a text.")] = 32768,
    context: Window = None,
    computing: Computing,
    as_json: Json = False,
) -> None:
    """Perplexity along long texts, beside that in windows of the training context."""
    from linspec.evaluate.positions import by_position

    _show(
        by_position,
        as_json,
        "stretches",
        model=model,
        **texts.to_library(),
        **computing.to_library(),
        length=length,
        context=context,
    )


@grouped
@guarded()
def continuations(
    model: Model,
    *,
    texts: Texts,
    limit_bytes: LimitBytes = None,
    context: Annotated[
        int, typer.Option(callback=whole(2), help="Tokens of a window, source and target.")
    ] = 512,
    computing: Computing,
    as_json: Json = False,
) -> None:
    """Bits per byte of an encoder-decoder (T5): the second half of every window, given the first."""
    from linspec.evaluate.continuations import continue_source

    _show(
        continue_source,
        as_json,
        model=model,
        **texts.to_library(),
        **computing.to_library(),
        limit_bytes=limit_bytes,
        context=context,
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
        compare_sources,
        as_json,
        teacher=teacher,
        student=student,
        **texts.to_library(),
        count=count,
        context=context,
        quantize=quantize,
    )


@grouped
@guarded()
def task(
    model: Model,
    tasks: Annotated[
        list[str], typer.Argument(help="Names that lm-eval knows, or tasks of --include.")
    ],
    *,
    limit: Annotated[
        int | None, typer.Option(callback=whole(), help="Most questions of a task.")
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(
            callback=whole(0), help="Worked examples before each.", show_default="the task's"
        ),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as YAML files.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask by the chat template of the model.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(callback=whole(), help="Answers that are written at a time.")
    ] = 8,
    drafter: DrafterName = "none",
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Tasks of lm-eval (pip install 'linspec[eval]'), which downloads their questions."""
    options = loading.to_library()
    try:
        from linspec.integrations.lm_eval import evaluate_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need lm-eval, and {error.name} is not installed: pip install 'linspec[eval]'"
        ) from error
    with quiet_stdout():
        found = evaluate_tasks(
            model,
            tasks,
            limit=limit,
            fewshot=fewshot,
            include=include,
            chat=chat,
            batch_size=batch_size,
            drafter=drafter,
            quantize=options["quantize"],
            kv_cache_dtype=options["kv"],
            attention=options["attention"],
            rope_scaling=options["rope_scaling"],
            device=options["device"],
        )
    print_json(found) if as_json else print_measured(found, "tasks")


@grouped
@guarded()
def parallel_bench(
    model: Annotated[
        str,
        typer.Argument(help="A diffusion model that writes text; tiny trains a small one first."),
    ] = "tiny",
    *,
    tasks: Annotated[
        str, typer.Option(help="Names by commas.", show_default="all waiting lines")
    ] = "",
    lengths: Annotated[str, typer.Option(help="Items of a line, by commas.")] = "3,4,6",
    per_forward: Annotated[
        str, typer.Option(help="Tokens that are decided at a time, by commas; 0 is all.")
    ] = "1,2,0",
    loop: Annotated[
        list[str] | None,
        typer.Option(help="Policies to judge too, such as commit=threshold:0.9; repeatable."),
    ] = None,
    samples: Annotated[
        int, typer.Option(callback=whole(), help="Questions of a task and length.")
    ] = 100,
    temperature: Annotated[
        float, typer.Option(callback=real(least=0), help="1 draws tokens; 0 takes the likeliest.")
    ] = 1.0,
    steps: Annotated[
        int, typer.Option(callback=whole(), help="Of training the tiny model.")
    ] = 3000,
    seed: Annotated[int, typer.Option(callback=whole(0), help="Of questions and training.")] = 0,
    computing: Computing,
    as_json: Json = False,
) -> None:
    """What a diffusion model loses by deciding several tokens at once, beside what a perfect one would."""
    from linspec.evaluate.parallel_bench import parallel_bench as library
    from linspec.evaluate.parallel_tasks import TASKS

    _show(
        library,
        as_json,
        "cells",
        model=model,
        tasks=words(tasks) or tuple(TASKS),
        lengths=numbers(lengths, "--lengths"),
        per_forward=numbers(per_forward, "--per-forward"),
        loops=loop or (),
        samples=samples,
        temperature=temperature,
        steps=steps,
        seed=seed,
        **computing.to_library(),
    )


def _show(measure: Callable[..., Any], as_json: bool, rows: str = "", **options: Any) -> None:
    """Measure and print; rows: the list of the result that people see as a table."""
    with quiet_stdout():
        found = measure(**options).to_json()
    print_json(found) if as_json else print_measured(found, rows)
