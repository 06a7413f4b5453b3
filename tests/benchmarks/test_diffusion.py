"""The lattice of masked diffusion: which combinations there are, what a cell keeps, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from checkpoints import model_dir
from denoisers import talker
from torch import Tensor

from benchmarks.diffusion import Cells, Way, main, measure, on_the_front, rows, table, ways_of
from benchmarks.diffusion_work import Answer, Judge, Tasks, Text, Work
from benchmarks.lattice import lattice, left_out, specs
from linspec import option
from linspec.diffusion import COMMITS, Candidates, CommitPolicy
from linspec.diffusion.kinds import kinds
from linspec.errors import ConfigError
from linspec.evaluate.lossless_denoising import spec_of

BLOCKS = ("fixed", "fixed:4")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return Tasks(tmp_path_factory.mktemp("tasks"), 4, 1, length=3)


def names(depth: int, *also: str) -> list[str]:
    return [spec_of(plan) for plan in lattice(BLOCKS, depth, also)]


def test_the_lattice_begins_with_static_and_has_every_policy() -> None:
    found = names(1)
    assert found[0] == "masked-diffusion:commit=static"
    policies = {(kind, entry.name) for kind, registry in kinds().items() for entry in registry}
    missing = {each.partition(" ")[0] for each in left_out()}
    for kind, name in policies - {
        ("block", "fixed"),
        ("stop", "end-of-text"),
        ("commit", "static"),
    }:
        usual = {("cache", "none"), ("verify", "none"), ("commit", "threshold")}
        if f"{kind}={name}" not in missing and (kind, name) not in usual:
            assert any(f"{kind}={name}" in spec for spec in found), (kind, name)
    assert len(set(names(5))) == len(names(5)) > len(names(2)) > len(found)
    # one kind changed, then two
    assert names(5)[: len(found)] == found


def test_combinations_that_say_nothing_are_left_out() -> None:
    assert not [spec for spec in names(5) if "stop=never" in spec and "cache=" in spec]
    assert any("stop=never" in spec for spec in names(1))
    assert "masked-diffusion:commit=static,cache=dual:9" in names(1, "cache=dual:9")
    with pytest.raises(ConfigError, match="names no kind"):
        names(1, "caches=dual")


@pytest.fixture
def fussy() -> Iterator[None]:
    """A policy of somebody else's that needs a number, and one that takes none."""

    @dataclass(frozen=True)
    class Options:
        number: int = option("a number", short=True)

    @COMMITS.register("fussy", summary="-", paper="-", options=Options)
    class Fussy(CommitPolicy):
        def commit(self, candidates: Candidates) -> Tensor:
            return candidates.confidence > -1

    @COMMITS.register("all", summary="-", paper="-")
    class All(Fussy):
        pass

    yield
    COMMITS.forget("fussy")
    COMMITS.forget("all")


def test_later_policies_join_by_themselves(fussy: None) -> None:
    assert "all" in specs("commit", BLOCKS) and "fussy" not in specs("commit", BLOCKS)
    assert any("commit=fussy is left out" in line for line in left_out())
    assert any("commit=fussy:3" in spec for spec in names(1, "commit=fussy:3"))


def clock() -> Callable[[], float]:
    ticks = count()
    return lambda: float(next(ticks))


def measured(work: Work, folder: Path, rounds: int, beside: str | None = None) -> tuple:
    plans = [spec_of(plan) for plan in lattice(work.blocks, 1)][:5]
    ways = ways_of(work, plans, beside)
    cells = Cells(folder, {"prompts": len(work.prompts)})
    measure(work, ways, cells, rounds, clock())
    return ways, cells


def test_a_run_that_was_stopped_goes_on(work: Tasks, tmp_path: Path) -> None:
    ways, cells = measured(work, tmp_path, 1)
    kept = cells.read(ways[1].name)
    assert len(kept["seconds"]) == 1 and len(kept["answers"]) == 4
    measured(work, tmp_path, 3)
    assert {len(cells.read(way.name)["seconds"]) for way in ways} == {3}
    again = cells.read(ways[1].name)
    assert again["answers"] == kept["answers"] and again["forwards"] == kept["forwards"]
    with pytest.raises(ConfigError, match="was begun with"):
        Cells(tmp_path, {"prompts": 5})


def test_lines_are_shares_of_the_reference(work: Tasks, tmp_path: Path) -> None:
    ways, cells = measured(work, tmp_path, 2)
    found = list(rows(work, ways, cells))
    first = found[0]
    assert (first["forwards"], first["computed"], first["speed"], first["spread"]) == (1, 1, 1, 0)
    assert first["tokens_per_forward"] == 1
    assert all(0 <= each["right"] <= 1 and each["speed"] == 1 for each in found)
    cached = next(each for each in found if "cache=prefix" in each["name"])
    assert cached["computed"] < 1 and cached["forwards"] == 1


def test_a_way_that_fails_is_told_below_the_table(work: Tasks, tmp_path: Path) -> None:
    def broken() -> object:
        raise ConfigError("no such thing")

    plain = ways_of(work, ["masked-diffusion:commit=static"], None)
    ways = [*plain, Way("bad", broken, work.prompts)]
    cells = Cells(tmp_path, {})
    measure(work, ways, cells, 2, clock())
    lines = list(rows(work, ways, cells))
    assert lines[1] == {"name": "bad", "error": "no such thing"}
    assert table(lines, "right", False).endswith("`bad`: no such thing")
    with pytest.raises(ConfigError, match="the reference bad failed"):
        list(rows(work, ways[::-1], cells))


def test_bold_is_what_nothing_beats() -> None:
    lines = [
        {"name": "slow", "speed": 1.0, "right": 0.9},
        {"name": "fast", "speed": 3.0, "right": 0.8},
        {"name": "worse", "speed": 2.0, "right": 0.8},
        {"name": "other", "speed": 2.0},
    ]
    assert on_the_front(lines, "right", False) == {"slow", "fast"}
    assert on_the_front(lines, "right", True) == {"fast"}
    text = table(lines, "right", False)
    assert "| **`fast`** | 3 | 0.8 |" in text and "| `other` | 2 | – |" in text


def test_text_is_judged_by_agreement_and_by_another_model(tmp_path: Path) -> None:
    beside = str(model_dir("softmax"))
    work = Text(str(talker()), 2, 6, beside)
    assert work.falls and {len(prompt) for prompt in work.prompts} == {96}
    ways, cells = measured(work, tmp_path, 1, beside)
    found = list(rows(work, ways, cells))
    assert found[0]["agreement"] == 1 and found[0]["bits_per_byte"] > 0
    last = found[-1]
    assert last["name"] == beside and "agreement" not in last
    # an autoregressive model needs a forward a token, and computes each once
    assert last["tokens_per_forward"] == pytest.approx(1, abs=0.2) and last["computed"] < 0.1
    other = work.judged([Answer((1,), "a")] * 2, [Answer((1, 2), "ab")] * 2)
    assert other["agreement"] == 0.5


def test_the_judge_says_what_the_full_form_does() -> None:
    judge = Judge(str(model_dir("softmax")))
    once, twice = judge.bits(["abcd"], ["end"]), judge.bits(["abcd", "abcd"], ["end", "end"])
    assert once == pytest.approx(twice) and once > 0
    assert judge.bits(["abcd"], [""]) == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["tasks", "--folder", str(tmp_path), "--prompts", "2", "--steps", "1", "--rounds", "1"]
    main([*args, "--depth", "1", "--only", "cache=", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["work"] == "tasks" and "cores" in lines[0]["machine"]
    assert all("cache=" in line["name"] for line in lines[2:]) and len(lines) > 3
    main([*args, "--depth", "0"])
    assert "| policies | forwards | computed |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--beside is a model of text"):
        main([*args, "--beside", "embedded-softmax"])
