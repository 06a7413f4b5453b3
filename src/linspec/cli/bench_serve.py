"""The verb `bench serve`: a running server under load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.checks import named, real, whole
from linspec.cli.console import (
    guarded,
    print_facts,
    print_json,
    print_table,
    quiet_stdout,
    say,
)
from linspec.cli.groups import grouped
from linspec.cli.options import Json, Temperature
from linspec.errors import ConfigError

_TIMES = ("first_token", "between_pieces", "per_token", "request_seconds")
_CLIENTS = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """How many requests come, and when."""

    requests: Annotated[int, typer.Option(callback=whole(), help="Requests in all.")] = 64
    rate: Annotated[
        float | None,
        typer.Option(
            callback=real(above=0), help="Requests in a second, at random, in an open loop."
        ),
    ] = None
    clients: Annotated[
        int | None,
        typer.Option(
            callback=whole(),
            help="Clients that each wait for their answer, instead of --rate.",
            show_default=str(_CLIENTS),
        ),
    ] = None
    seed: Annotated[int, typer.Option(callback=whole(0), help="Of the arrivals.")] = 0


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Latencies in milliseconds; the share of requests that have both is the goodput."""

    ttft_ms: Annotated[
        float | None,
        typer.Option(callback=real(above=0), help="Target for the first token, for goodput."),
    ] = None
    tpot_ms: Annotated[
        float | None,
        typer.Option(callback=real(above=0), help="Target for a token in the mean, for goodput."),
    ] = None


@grouped
@guarded()
def serve(
    url: Annotated[str, typer.Argument(help="Of a server that speaks OpenAI's API.")],
    *,
    prompts: Annotated[
        Path,
        typer.Option(
            callback=named,
            help="JSON lines with turns or prompt, and category; Spec-Bench's file is one.",
        ),
    ],
    per_family: Annotated[
        int, typer.Option(callback=whole(), help="Prompts of each category.")
    ] = 10,
    load: Load,
    tokens: Annotated[int, typer.Option(callback=whole(), help="Most tokens of an answer.")] = 128,
    temperature: Temperature = 0.0,
    name: Annotated[
        str | None, typer.Option(help="The model's name there.", show_default="its first")
    ] = None,
    key: Annotated[str, typer.Option(help="A bearer key.", envvar="LINSPEC_KEY")] = "",
    goal: Goal,
    as_json: Json = False,
) -> None:
    """Load a running server with prompts: throughput, time to the first token, between tokens, errors.

    An open loop (--rate) sends requests at random moments, however slow the answers are; a closed one
    (--clients) waits for them.
    """
    from linspec.bench.arrivals import Workload
    from linspec.bench.prompts import read_questions
    from linspec.bench.serving import Targets, bench_serving

    targets = None
    if goal.ttft_ms is not None and goal.tpot_ms is not None:
        targets = Targets(goal.ttft_ms / 1000, goal.tpot_ms / 1000)
    elif goal != Goal():
        raise ConfigError("goodput needs both targets, --ttft-ms and --tpot-ms; give both or none")
    clients = _CLIENTS if load.rate is None and load.clients is None else load.clients
    workload = Workload(requests=load.requests, rate=load.rate, clients=clients, seed=load.seed)
    questions = read_questions(prompts, per_family)
    sampling: dict[str, Any] = {"max_tokens": tokens, "temperature": temperature}
    with quiet_stdout():
        report = bench_serving(
            url, questions, workload, model=name, targets=targets, key=key, **sampling
        )
    found = report.to_json()
    print_json(found) if as_json else _print(found)


def _print(found: dict[str, Any]) -> None:
    print_facts({k: v for k, v in found.items() if k not in (*_TIMES, "errors")})
    shares = list(found["request_seconds"])
    rows = [[each, *(f"{1000 * v:.1f}" for v in found[each].values())] for each in _TIMES]
    print_table("milliseconds", ("of", *shares), rows)
    for error, count in found["errors"].items():
        say(f"{count} times: {error}")
