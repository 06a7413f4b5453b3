"""linspec beside other engines.

python -m benchmarks.peers --shapes 110m --contexts 128,2048 --out runs/peers
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import whole
from linspec.cli.console import guarded, numbers, place_on, print_json, quiet_stdout, say
from linspec.cli.options import Json, Threads
from linspec.errors import ConfigError
from studies.lib.command import AGAIN, called, command, words
from studies.lib.plan import check_places


@guarded(AGAIN)
def peers(
    out: Annotated[Path, typer.Option(help="Folder of models, finished cells and plots.")] = Path(
        "runs/peers"
    ),
    engines: Annotated[
        str, typer.Option("--peers", help="Engines, by commas.", show_default="all")
    ] = "",
    shapes: Annotated[str, typer.Option(help="110m, 1b, toy, embedded.")] = "110m,1b",
    contexts: Annotated[
        str, typer.Option(help="Tokens before decoding, by commas.")
    ] = "128,2048,8192,32768",
    batches: Annotated[str, typer.Option(help="Sequences at once, by commas.")] = "1",
    formats: Annotated[
        str, typer.Option(help="Weights, like int8,q4_0.", show_default="all of every engine")
    ] = "",
    accept: Annotated[
        str, typer.Option(help="Rates at which drafts are taken to be accepted, like 0,0.5,1.")
    ] = "",
    tokens: Annotated[
        int, typer.Option(callback=whole(), help="Tokens decoded in a round, at least.")
    ] = 16,
    rounds: Annotated[
        int, typer.Option(callback=whole(), help="Rounds in which engines take turns.")
    ] = 3,
    again: Annotated[
        bool, typer.Option("--again", help="Measure finished cells of these groups too.")
    ] = False,
    python: Annotated[
        list[str] | None,
        typer.Option(help="PEER=PATH: the interpreter that has an engine; repeatable."),
    ] = None,
    guard: Annotated[
        str, typer.Option(help="A command that keeps the machine quiet while another runs.")
    ] = "",
    page: Annotated[
        Path | None, typer.Option(help="The markdown page.", show_default="OUT/cpu.md")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The first context, one short round.")
    ] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only write and convert the models.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure linspec beside the engines that are installed, on the same weights, in turns."""
    place_on("cpu", threads)
    with quiet_stdout():
        import torch

        from benchmarks.peers.base import MODULES
        from benchmarks.peers.cells import Plan
        from benchmarks.peers.page import TITLE, summary, write_page
        from benchmarks.peers.run import compare
        from linspec.utils.places import check_text

        check_places(out, page)
        plan = Plan(
            out=out,
            peers=words(engines) or tuple(MODULES),
            shapes=words(shapes),
            contexts=tuple(numbers(contexts, "--contexts")),
            batches=tuple(numbers(batches, "--batches")),
            formats=words(formats),
            accept=_rates(accept),
            tokens=tokens,
            rounds=rounds,
            again=again,
            threads=torch.get_num_threads(),
            pythons=_pythons(python or []),
            guard=guard,
        )
        plan = plan.quick() if quick else plan
        check_text(page or out / "cpu.md", (TITLE,))
        skipped = compare(plan, prepare_only=prepare)
        written = write_page(plan, skipped, page)
    if as_json:
        print_json(summary(plan, skipped))
    for name, reason in skipped.items():
        say(f"skipped {name}: {reason}")
    say(f"written to {written}")


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in words(text))
    except ValueError as error:
        raise ConfigError(f"--accept takes numbers separated by commas, got {text!r}") from error


def _pythons(given: list[str]) -> dict[str, str]:
    """PEER=PATH as a table."""
    if any("=" not in each for each in given):
        raise ConfigError(f"--python takes PEER=PATH, got {', '.join(given)}")
    return dict(each.split("=", 1) for each in given)


app = command(peers, "benchmarks.peers", "--shapes 110m --quick")

if __name__ == "__main__":
    app(prog_name=called("benchmarks.peers"))
