"""The verbs `bench …`: how fast a model decodes, drafts, computes and begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.checks import named, real, whole
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
from linspec.cli.options import (
    Data,
    Json,
    Loading,
    Model,
    PolicyName,
    Temperature,
    Threads,
    VerifierName,
)
from linspec.errors import ConfigError

# for people
_COLUMNS = (
    "drafter",
    "tokens/s",
    "× plain (95%)",
    "oracle",
    "per round",
    "by depth",
    "draft, verify, rest",
)
_DEPTHS = 4


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
    prompts: Annotated[
        Path | None,
        typer.Option(
            callback=named,
            help="JSON lines with turns or prompt, and category; Spec-Bench's file is one.",
            show_default="pieces of held-out text",
        ),
    ] = None,
    per_family: Annotated[
        int, typer.Option(callback=whole(), help="Prompts of each category.")
    ] = 5,
    tokens: Annotated[int, typer.Option(callback=whole(), help="Most tokens of an answer.")] = 64,
    temperature: Temperature = 0.0,
    batch: Annotated[
        int, typer.Option(callback=whole(), help="Prompts that are answered at once.")
    ] = 1,
    policy: PolicyName = "auto",
    verifier: VerifierName = "lossless",
    loop: Annotated[
        list[str] | None,
        typer.Option(
            help="A generation loop to compare too, such as first:DIR; repeatable.",
            show_default="none",
        ),
    ] = None,
    data: Data = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Compare every drafter on a model and the same prompts: speed beside plain decoding, acceptance.

    Modes take turns prompt by prompt; plain decoding runs first and last. A drafter that changes the greedy
    output is an error, but with a lossy verifier or loop, whose rows say how far outputs agree.
    """
    from linspec.bench.drafters import bench_drafters

    options = loading.to_library()
    with quiet_stdout():
        found = bench_drafters(
            model,
            drafter or (),
            prompts=prompts,
            per_family=per_family,
            tokens=tokens,
            temperature=temperature,
            batch=batch,
            policy=policy,
            verifier=verifier,
            loops=loop or (),
            data=data or ["stdlib"],
            **options,
        ).to_json()
    if as_json:
        print_json(found)
        return
    print_facts({**found["machine"], **found["settings"]})
    families = list(dict.fromkeys(row["family"] for row in found["rows"]))
    whole = [row for row in found["rows"] if row["family"] == families[0]]
    print_table(f"prompts: {families[0]}", _COLUMNS, [_drafter_line(row) for row in whole])
    if len(families) > 1:
        print_table("× plain, by family", *_by_family(found["rows"], families[1:]))
    for row in whole:
        if row["lossy"] and row["agreement"] is not None:
            judged = "" if row["drafter"].startswith("loop ") else f" with verifier {verifier}"
            say(
                f"{row['drafter']} is lossy{judged}: {row['agreement']:.0%} of the tokens of plain decoding "
                "came before the first difference"
            )
    for each in found["skipped"]:
        say(f"left out {each['drafter']}: {each['reason']}")


@guarded()
def kernels(
    model: Annotated[
        str | None,
        typer.Argument(help="A model, to time its own layers and steps.", show_default=False),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Of the weights, by commas: float32, bfloat16 (without MODEL), int8, int4.",
            show_default="all",
        ),
    ] = "",
    repeats: Annotated[
        int, typer.Option(callback=whole(), help="Passes after a warm-up; the quickest counts.")
    ] = 20,
    nodes: Annotated[
        str,
        typer.Option(
            help="Rows of a product, by commas; without MODEL.", show_default="1,2,4,8,16"
        ),
    ] = "",
    ghz: Annotated[
        float | None,
        typer.Option(
            callback=real(above=0, most=100),
            help="The clock that cycles are counted by; without MODEL.",
            show_default="measured",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(callback=whole(0, 2**63 - 1), help="Of the weights; without MODEL.")
    ] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time products of weights and rows on one core, or the layers and steps of MODEL on all, by format."""
    place_on("cpu", threads)
    if model is None:
        _products(words(formats), numbers(nodes, "--nodes"), repeats, ghz, seed, as_json)
        return
    if nodes or ghz:
        raise ConfigError("--nodes and --ghz are for products without MODEL; leave one of them out")
    from linspec.bench.kernels import bench_kernels

    with quiet_stdout():
        found = bench_kernels(model, words(formats), repeats=repeats).to_json()
    if as_json:
        print_json(found)
        return
    print_facts({**found["machine"], **found["settings"], **found["kernels"]})
    print_rows("linear layers", map(_in_microseconds, found["linears"]))
    print_rows("steps", map(_in_microseconds, found["steps"]))


def _products(
    formats: list[str], rows: list[int], repeats: int, ghz: float | None, seed: int, as_json: bool
) -> None:
    from linspec.bench.products import ROWS, bench_products

    found = bench_products(formats, rows or ROWS, repeats=repeats, ghz=ghz, seed=seed).to_json()
    if as_json:
        print_json(found)
        return
    facts = {"kernels": found["kernels"], "clock": found["clock"]}
    print_facts({**found["machine"], **found["settings"], **facts})
    print_rows("products; cycles are for 32 weights and a row", found["products"])


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
    parts = " ".join(f"{100 * row[name]:.0f}%" for name in ("drafting", "verifying", "rest"))
    return [
        row["drafter"] + (" (lossy)" if row["lossy"] else ""),
        f"{row['tokens_per_s']:.1f}",
        f"{row['times_plain']:.2f} ({row['low']:.2f}…{row['high']:.2f})",
        "" if row["oracle"] is None else f"{row['oracle']:.2f}",
        f"{row['tokens_per_round']:.2f}",
        " ".join(f"{share:.2f}" for share in row["acceptance"][:_DEPTHS]),
        parts if row["verifying"] else "",
    ]


def _by_family(
    rows: list[dict[str, Any]], families: list[str]
) -> tuple[tuple[str, ...], list[list[object]]]:
    """Columns and lines of a table of speed-ups."""
    names = dict.fromkeys(row["drafter"] for row in rows)
    times = {(row["drafter"], row["family"]): row["times_plain"] for row in rows}
    return ("drafter", *families), [[name, *(times[name, f] for f in families)] for name in names]


def _in_microseconds(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people, who read microseconds more easily."""
    seconds = row["seconds"]
    return {
        ("µs" if k == "seconds" else k): (1e6 * seconds if k == "seconds" else v)
        for k, v in row.items()
    }
