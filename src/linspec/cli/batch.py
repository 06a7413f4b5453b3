"""The verb `batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import check_serve_extra, whole
from linspec.cli.console import guarded, importing, print_json, quiet_stdout, say
from linspec.cli.groups import grouped
from linspec.cli.options import Decoding, Json, MaxTokens
from linspec.errors import ConfigError

_AGAIN = "every answer so far is kept; give the same command again to go on"


@grouped
@guarded(_AGAIN)
def batch(
    source: Annotated[Path, typer.Argument(help="A .jsonl file: OpenAI's batch, or prompts.")],
    target: Annotated[Path, typer.Argument(help="Where the answers go, a line each.")],
    decoding: Decoding,
    model: Annotated[str, typer.Option(help="Any model that `generate` takes.")],
    name: Annotated[
        str | None,
        typer.Option(help="What lines call the model.", show_default="the same"),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(callback=whole(), help="Sequences that run at once.")
    ] = 8,
    max_tokens: MaxTokens = 512,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin again where answers are there.")
    ] = False,
    replicas: Annotated[
        int, typer.Option(callback=whole(), help="Copies of the model; more than one with --ray.")
    ] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="On Ray Data, on the cluster of RAY_ADDRESS or here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer every line of a file once; a run that was ended goes on where it was."""
    if replicas > 1 and not ray:
        raise ConfigError(
            f"{replicas} replicas need Ray to run on; give --ray too, or leave --replicas out"
        )
    with importing():
        from linspec.serve.batch import open_batch

    called = model if name is None else name
    with (
        open_batch(source, target, called, overwrite=overwrite, max_tokens=max_tokens) as work,
        quiet_stdout(),
    ):
        if work.left:
            with importing():
                check_serve_extra()
                from linspec.serve.batch_model import answer_with
                from linspec.serve.ray_batch import answer_on_ray
            given = {**decoding.to_library(), "max_batch": max_batch}
            if ray:
                answer_on_ray(work, model, replicas=replicas, **given)
            else:
                answer_with(work, model, **given)
        summary = work.summary.to_json()
    if as_json:
        print_json({"out": str(target), **summary})
        return
    say(
        f"{target}: {summary['lines']} lines, {summary['resumed']} from before, {summary['failed']} failed "
        f"now, {summary['completion_tokens']} tokens, {summary['tokens_per_s']:.1f} tokens/s"
    )
