"""The verbs `bench …`: how fast a model decodes, drafts, computes and begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from linspec.cli.checks import whole
from linspec.cli.console import (
    guarded,
    numbers,
    place_on,
    print_facts,
    print_json,
    print_rows,
    print_speed,
    print_table,
    quiet_stdout,
    say,
    words,
)
from linspec.cli.groups import grouped
from linspec.cli.options import Data, Json, Loading, Model, PolicyName, Threads

# for people: tokens per round, as the policy chose and with a fixed number of draft nodes
_COLUMNS = ("drafter", "tokens/s", "× plain", "per round", "fixed", "accepted by depth")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is timed, and how often."""

    tokens: Annotated[int, typer.Option(callback=whole(), help="Tokens decoded in a repeat.")] = 64
    repeats: Annotated[
        int, typer.Option(callback=whole(), help="Repeats after a warm-up; the median counts.")
    ] = 5
    policy: PolicyName = "auto"


@grouped
@guarded()
def speed(
    model: Model,
    *,
    contexts: Annotated[str, typer.Option(help="Tokens before decoding, by commas.")] = "128,1024",
    drafter: Annotated[
        list[str] | None, typer.Option(help="A drafter beside plain decoding; repeatable.")
    ] = None,
    timing: Timing,
    data: Data = None,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="Measure the memory's speed too.")
    ] = False,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Time decoding after long and short contexts, plain and with drafters, in one run."""
    from linspec.bench.speed import bench as library

    options = loading.to_library()
    with quiet_stdout():
        result = library(
            model,
            numbers(contexts, "--contexts"),
            drafter or (),
            **asdict(timing),
            data=data or ["stdlib"],
            bandwidth=bandwidth,
            **options,
        ).to_json()
    print_json(result) if as_json else print_speed(result)


@grouped
@guarded()
def drafters(
    model: Model,
    *,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; repeatable.", show_default="all that fit the model"),
    ] = None,
    context: Annotated[int, typer.Option(callback=whole(), help="Tokens before decoding.")] = 128,
    timing: Timing,
    nodes: Annotated[
        int, typer.Option(callback=whole(), help="Draft tokens where acceptance is measured.")
    ] = 12,
    prompts: Annotated[
        int, typer.Option(callback=whole(), help="Texts on which acceptance is measured.")
    ] = 8,
    data: Data = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Compare every drafter on a model: speed beside plain decoding, acceptance by depth."""
    from linspec.bench.drafters import bench_drafters

    options = loading.to_library()
    with quiet_stdout():
        found = bench_drafters(
            model,
            drafter or (),
            context=context,
            **asdict(timing),
            nodes=nodes,
            prompts=prompts,
            data=data or ["stdlib"],
            **options,
        ).to_json()
    if as_json:
        print_json(found)
        return
    print_facts({**found["machine"], **found["settings"]})
    print_table("drafters", _COLUMNS, [_drafter_line(row) for row in found["rows"]])
    for each in found["skipped"]:
        say(f"left out {each['drafter']}: {each['reason']}")


@guarded()
def kernels(
    model: Model,
    formats: Annotated[
        str, typer.Option(help="Of the weights, by commas.", show_default="float32,int8,int4")
    ] = "",
    repeats: Annotated[
        int, typer.Option(callback=whole(), help="Passes after a warm-up; the quickest counts.")
    ] = 20,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time linear layers and steps for each format of weights, beside the speed of the memory."""
    from linspec.bench.kernels import bench_kernels

    place_on("cpu", threads)
    with quiet_stdout():
        found = bench_kernels(model, words(formats), repeats=repeats).to_json()
    if as_json:
        print_json(found)
        return
    print_facts({**found["machine"], **found["settings"], **found["kernels"]})
    print_rows("linear layers", map(_in_microseconds, found["linears"]))
    print_rows("steps", map(_in_microseconds, found["steps"]))


@guarded()
def load(
    model: Model,
    tokens: Annotated[
        int, typer.Option(callback=whole(), help="Tokens that a process generates.")
    ] = 4,
    repeats: Annotated[
        int, typer.Option(callback=whole(), help="Processes of each kind; medians count.")
    ] = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time fresh processes from their start to the first output, cold and warm, with their memory."""
    from linspec.bench.load import bench_load as library

    with quiet_stdout():
        found = library(model, tokens=tokens, repeats=repeats, threads=threads).to_json()
    print_json(found) if as_json else print_facts(found)


def _drafter_line(row: dict[str, Any]) -> list[object]:
    shares = " ".join(f"{share:.2f}" for share in row["acceptance"])
    numbers = ("tokens_per_s", "times_plain", "tokens_per_round", "fixed_tokens_per_round")
    return [row["drafter"], *(row[name] for name in numbers), shares]


def _in_microseconds(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people, who read microseconds more easily."""
    seconds = row["seconds"]
    return {
        ("µs" if k == "seconds" else k): (1e6 * seconds if k == "seconds" else v)
        for k, v in row.items()
    }
