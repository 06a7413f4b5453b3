"""`linspec bench serve`: what it counts is what a server did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_server import quiet, running, talker

from linspec.bench.arrivals import Workload, poisson
from linspec.bench.prompts import Question, read_questions
from linspec.bench.serving import Answer, Targets, bench_serving, summary
from linspec.cli import app
from linspec.errors import InputError, LinspecError
from linspec.llm import LLM
from linspec.serve.settings import Settings

ASKED = [Question("chat", "ab", asked=True), Question("text", "ab cd", asked=False)]


def test_arrivals_have_their_rate_and_their_seed() -> None:
    times = poisson(4.0, 4000, seed=1)
    assert times == poisson(4.0, 4000, seed=1) != poisson(4.0, 4000, seed=2)
    assert times == sorted(times) and times[-1] / 4000 == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("given", [{}, {"rate": 1.0, "clients": 2}, {"rate": 0.0}, {"clients": 0}])
def test_a_workload_is_an_open_or_a_closed_loop(given: dict[str, Any]) -> None:
    with pytest.raises(LinspecError, match=r"rate|clients"):
        Workload(**given)


@pytest.mark.parametrize("load", [{"clients": 3}, {"rate": 200.0}])
def test_a_run_counts_what_the_server_did(load: dict[str, Any]) -> None:
    with running({"talker": LLM(talker())}) as (address, workers):
        found = bench_serving(
            address,
            ASKED,
            Workload(requests=12, **load),
            max_tokens=6,
            temperature=1.0,
            targets=Targets(60.0, 60.0),
        )
        assert quiet(workers["talker"])
    assert found.requests == found.answered == 12 and not found.errors
    assert 12 <= found.output_tokens <= 72 and found.goodput == 1.0
    assert found.output_tokens_per_s == pytest.approx(found.output_tokens / found.seconds)
    for times in (found.first_token, found.request_seconds):
        assert 0 < times["p50"] <= times["p95"] <= times["p99"] <= times["max"]
    assert json.loads(json.dumps(found.to_json()))["requests"] == 12


def test_what_a_server_refuses_is_an_error_of_the_run() -> None:
    settings = Settings.read(None, queue_limit=0)
    with running({"talker": LLM(talker(), max_batch=1)}, settings) as (address, _):
        found = bench_serving(address, ASKED, Workload(requests=8, clients=8), max_tokens=30)
    assert found.answered < 8 and sum(found.errors.values()) == 8 - found.answered
    assert any("429" in error for error in found.errors)


def test_an_address_without_a_server_is_named() -> None:
    with pytest.raises(InputError, match="http://127.0.0.1:9"):
        bench_serving("http://127.0.0.1:9", ASKED, Workload(requests=1, clients=1))
    with pytest.raises(InputError, match="no prompt"):
        bench_serving("http://127.0.0.1:9", [], Workload(requests=1, clients=1))


def test_figures_are_those_of_the_moments() -> None:
    """Two requests by hand: one of four tokens in three pieces, one that failed."""
    good = Answer("chat", sent=1.0, pieces=[1.5, 1.7, 2.1], ended=2.1, tokens=4)
    found = summary([good, Answer("chat", sent=1.0, ended=3.0, error="gone")], Targets(0.6, 0.3))
    assert (found.requests, found.answered, found.goodput) == (2, 1, 0.5)
    assert found.errors == {"gone": 1} and found.seconds == pytest.approx(2.0)
    assert found.output_tokens_per_s == pytest.approx(2.0)
    assert found.first_token["max"] == pytest.approx(0.5)
    assert found.between_pieces["max"] == pytest.approx(0.4)
    assert found.per_token["mean"] == pytest.approx(0.2)
    assert (
        summary([good], Targets(0.6, 0.1)).goodput == summary([good], Targets(0.4, 1)).goodput == 0
    )


def test_the_command_prints_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "ab"}, {"turns": ["ab"], "category": "qa"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [each.asked for each in read_questions(tmp_path / "prompts.jsonl", 3)] == [False, True]
    given = ["--prompts", str(tmp_path / "prompts.jsonl"), "--requests", "4", "--tokens", "4"]
    with running({"talker": LLM(talker())}) as (address, _):
        assert verb("bench", "serve", address, *given, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert verb("bench", "serve", address, *given) == 0
    assert found["answered"] == 4 and "first_token" in capsys.readouterr().out
    assert verb("bench", "serve", "x", *given, "--ttft-ms", "5") == 1
    assert "--tpot-ms" in capsys.readouterr().err


def verb(*arguments: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as ended:
        app(list(arguments))
    return int(ended.value.code or 0)
