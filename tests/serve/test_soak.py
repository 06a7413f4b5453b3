"""The commands that measure servers: who is asked, for how long, and what of the memory is told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="the server needs the extra serve")

from api_server import quiet, running, talker

from benchmarks.serving import _arguments, contenders
from benchmarks.soak import main, memory, resident
from linspec.bench.arrivals import Workload
from linspec.bench.prompts import Question
from linspec.bench.serving import bench_serving
from linspec.errors import ConfigError
from linspec.llm import LLM


def test_clients_ask_for_so_many_seconds_and_wait_for_their_answers() -> None:
    asked = [Question("text", "ab cd", asked=False)]
    with running({"talker": LLM(talker())}) as (address, workers):
        load = Workload(requests=10**4, clients=2, seconds=0.5)
        found = bench_serving(address, asked, load, max_tokens=6)
        assert quiet(workers["talker"])
    assert 2 <= found.answered == found.requests < 10**4 and not found.errors
    assert 0.4 < found.seconds < 10
    with pytest.raises(ConfigError, match="end a closed loop"):
        Workload(rate=1.0, seconds=3)


def test_memory_is_that_behind_the_first_third() -> None:
    grown = [100, 200, 300, 1000, 1000, 1010, 1000, 990, 1000]
    found = memory([each * 2**20 for each in grown])
    assert found == {"first_mib": 100, "median_mib": 1000, "last_mib": 1000, "spread": 0.01}
    assert resident("VmHWM:\t9 kB\nVmRSS:\t   7 kB\n") == 7 * 1024


def names(*words: str) -> list[str]:
    given: argparse.Namespace = _arguments(["x.gguf", "--prompts", "p", *words])
    return [each.name for each in contenders(given)]


def test_servers_are_those_that_are_at_hand_and_wanted(tmp_path: Path) -> None:
    assert names() == ["linspec", "linspec, no drafts"]
    everything = names("--directory", str(tmp_path), "--llama-python", "python")
    assert everything[3:] == ["llama.cpp", "transformers", "transformers, no batches"]
    assert names("--directory", str(tmp_path), "--only", "transformers") == everything[4:]


@pytest.mark.slow
def test_a_short_soak_tells_its_capacity_and_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "the end"}\n')
    words = [str(talker()), "--prompts", str(tmp_path / "prompts.jsonl"), "--minutes", "0.2"]
    main([*words, "--warm-seconds", "1", "--clients", "2", "--tokens", "8", "--context", "64"])
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["part"], last["part"]) == ("capacity", "soak")
    assert last["requests"] == last["answered"] and not last["errors"]
    assert last["rate"] == pytest.approx(0.8 * first["requests_per_s"])
    assert last["first_mib"] > 50 and 0 <= last["spread"] < 0.5
