"""The study's machinery: order, cache, resuming, what is shown; cells so small that they mean nothing."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import model_dir
from hypothesis import given
from hypothesis import strategies as st

from linspec.errors import ConfigError, InputError, TrainingError
from linspec.mixers import MIXERS
from linspec.utils.places import mark_folder
from studies.linearized_llm import TABLES, Plan, Size, make_plan, study
from studies.linearized_llm.attentions import ARRANGEMENTS, AUG, BY_HEAD, PARTS, PLAIN, attentions
from studies.linearized_llm.cache import Cache
from studies.linearized_llm.paper import comparison
from studies.linearized_llm.plan import MODULE
from studies.linearized_llm.quality import Quality
from studies.linearized_llm.recipes import Recipes
from studies.linearized_llm.run import order
from studies.linearized_llm.table import Cell, Results, with_spread

SIZE = Size(
    name="test",
    tokens=64,
    context=32,
    batch_tokens=32,
    group=4,
    taps=3,
    limit_bytes=60,
    contexts=(16, 32),
    decoded=8,
    repeats=1,
    prompt=16,
    heads_tokens=64,
)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    rng = random.Random(0)
    path.write_text(" ".join(rng.choice(("ab", "cd", "end", "the")) for _ in range(900)))
    return path


@pytest.fixture
def plan(tmp_path: Path, text: Path) -> Plan:
    teacher = str(model_dir("softmax"))
    return make_plan(tmp_path / "out", teacher=teacher, data=[str(text)], size=SIZE, rows=["local"])


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells are not trained; the list has those that were measured."""
    seen: list[Cell] = []

    def measure(self: Quality, cell: Cell, folder: Path) -> dict[str, Any]:
        assert folder.is_dir()
        seen.append(cell)
        return {"bits_per_byte": 1.0 + len(seen) / 100, "perplexity": 2.0 + len(seen)}

    monkeypatch.setattr(Quality, "measure", measure)
    return seen


def test_every_attention_and_arrangement_is_a_cell_or_says_why_not(plan: Plan) -> None:
    every = Plan(plan.out, plan.teacher, plan.domains, SIZE)
    cells = Quality(every).cells()
    assert {(c.row, c.column) for c in cells} == {(r, p) for r in attentions() for p in PARTS}
    others = {*ARRANGEMENTS, *BY_HEAD, *(n for n in MIXERS.names() if MIXERS[n].stands_in)}
    assert {c.row.partition(":")[0] for c in cells} >= set(MIXERS.names()) - others
    for cell in cells:
        assert bool(cell.undefined) != bool(cell.settings)
    assert next(c.undefined for c in cells if (c.row, c.column) == ("softmax", "aug"))
    # softmax and local can be had wherever the paper has them
    assert all(c.settings for c in cells if c.row == "local" or c.column == PLAIN)


def test_finished_cells_are_kept_and_a_sitting_ends_with_its_budget(
    plan: Plan, made_up: list[Cell]
) -> None:
    hours = iter(range(0, 10**9, 3600))
    first = study(plan, ["quality"], budget=90, clock=lambda: next(hours))
    assert first.measured == 1 and first.remaining == 6
    # the headline comes first
    assert [(c.row, c.column) for c in made_up] == [("softmax", PLAIN)]
    second = study(plan, ["quality"])
    assert second.measured == 6 and second.remaining == 0
    third = study(plan, ["quality"])
    assert third.measured == 0 and len(made_up) == 7
    assert third.to_json()["tables"] == second.to_json()["tables"]


def test_more_seeds_add_to_what_is_there(plan: Plan, made_up: list[Cell]) -> None:
    study(plan, ["quality"])
    more = Plan(plan.out, plan.teacher, plan.domains, plan.size, 3, plan.rows)
    found = study(more, ["quality"]).to_json()["tables"]["quality"]
    assert found["done"] == found["total"] == len(made_up) == 21
    assert len({row["key"] for row in found["rows"]}) == 21


def test_an_interrupted_cell_is_measured_again_and_the_others_are_not(
    plan: Plan, made_up: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Quality.measure

    def stop(self: Quality, cell: Cell, folder: Path) -> dict[str, Any]:
        if len(made_up) == 3:
            raise KeyboardInterrupt
        return measure(self, cell, folder)

    monkeypatch.setattr(Quality, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        study(plan, ["quality"])
    monkeypatch.setattr(Quality, "measure", measure)
    assert study(plan, ["quality"]).measured == 4
    assert len({cell.key for cell in made_up}) == len(made_up) == 7


def test_a_damaged_file_is_a_cell_not_measured(plan: Plan, made_up: list[Cell]) -> None:
    study(plan, ["quality"])
    next((plan.out / "cells").glob("*.json")).write_text('{"result": {"bits')
    assert study(plan, ["quality"]).measured == 1


def test_a_cell_that_another_process_has_is_left_to_it(plan: Plan, made_up: list[Cell]) -> None:
    mark_folder(plan.out, MODULE)
    cache = Cache(plan.out)
    taken = order(Quality(plan).cells())[2]
    with cache.claim(taken) as folder:
        assert folder is not None
        assert study(plan, ["quality"]).remaining == 1
    assert study(plan, ["quality"]).measured == 1


def test_a_cell_that_fails_is_a_result(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Quality, cell: Cell, folder: Path) -> dict[str, Any]:
        raise TrainingError("the loss is\nnan")

    monkeypatch.setattr(Quality, "measure", fail)
    found = study(plan, ["quality"])
    assert found.remaining == 0
    assert "failed: the loss is nan" in found.page.read_text()


@given(
    ranks=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 9)), max_size=30)
)
def test_order_is_by_rank_and_measures_nothing_twice(ranks: list[tuple[int, int, int]]) -> None:
    cells = [
        Cell(table="t", row=str(i), column="c", kind="k", settings={"x": x}, seed=seed, rank=rank)
        for i, (rank, seed, x) in enumerate(ranks)
    ]
    found = order(cells)
    assert {c.key for c in found} == {c.key for c in cells}
    assert len({c.key for c in found}) == len(found)
    worth = [c.rank + 2 * c.seed for c in found]
    assert worth == sorted(worth)


def test_the_key_covers_what_determines_the_figures(plan: Plan, text: Path) -> None:
    def keys(**changed: Any) -> set[str]:
        options = {"teacher": plan.teacher, "data": [str(text)], "size": SIZE} | changed
        cells = Quality(make_plan(plan.out, rows=["local"], **options)).cells()
        return {cell.key for cell in cells if not cell.undefined}

    before = keys()
    assert keys() == before
    assert not keys(tokens=128) & before
    assert not keys(teacher=str(model_dir("softmax", seed=1))) & before
    text.write_text(text.read_text() + " the end")
    assert not keys() & before


def test_a_folder_of_known_files_is_their_domains(tmp_path: Path) -> None:
    (tmp_path / "wikitext2_valid.txt").write_text("the end")
    problem = {"question": "1 + 1?", "answer": "2 — zwei"}
    (tmp_path / "gsm8k_train.jsonl").write_text(json.dumps(problem) + "\n")
    plan = make_plan(tmp_path / "out", data=["stdlib", str(tmp_path)])
    assert list(plan.domains) == ["stdlib", "wikitext2", "gsm8k"]
    record = json.loads(Path(plan.domains["gsm8k"][0]).read_text())
    assert record == {"text": "1 + 1?\n2 — zwei\n"}
    with pytest.raises(InputError, match="does not exist"):
        make_plan(tmp_path / "other", data=[str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    "settings",
    [
        *({"size": "huge"}, {"tokens": 0}, {"seeds": 0}, {"teacher": ""}, {"data": [""]}),
        *({"budget": 0.0}, {"budget": math.nan}, {"budget": math.inf}),
        *({"recall_share": math.nan}, {"recall_share": 1.5}),
    ],
)
def test_impossible_plans(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_plan(tmp_path, **settings)


def test_a_budget_that_is_no_number_does_not_run_for_ever(plan: Plan, made_up: list[Cell]) -> None:
    with pytest.raises(ConfigError, match="--budget must be a finite number above 0, got nan"):
        study(plan, ["quality"], budget=math.nan)
    assert not made_up and not plan.out.exists()


def test_a_short_sitting_has_small_cells(tmp_path: Path) -> None:
    names = [make_plan(tmp_path, budget=b).size.name for b in (None, 60.0, 10.0, 1.0)]
    assert names == ["default", "default", "small", "tiny"]


def test_spread() -> None:
    assert with_spread([]) == "–"
    assert with_spread([1.5]) == "1.500"
    assert with_spread([1.0, 2.0, 3.0]) == "2.000 (1.000–3.000)"
    assert with_spread([7.0, 7.0], 0) == "7"
    assert with_spread([-0.5, 1.0], 1, sign="+", unit="%") == "+0.2% (-0.5% to +1.0%)"


def test_every_table_says_where_it_comes_from(plan: Plan) -> None:
    for entry in TABLES:
        assert entry.paper and entry.summary
        # an empty table is shown too
        assert entry.value(plan).section(Results([])).title


def test_rows_are_chosen_by_name_and_an_unknown_one_is_said(
    plan: Plan, made_up: list[Cell]
) -> None:
    with pytest.raises(ConfigError, match="row 'locl' to choose; there are 'softmax'"):
        study(replace(plan, rows=("locl",)), ["quality"])
    with pytest.raises(ConfigError, match="filled whole"):
        study(plan, ["design"])
    recipes = Recipes(replace(plan, rows=("linspec",)))
    assert {cell.row for cell in recipes.cells()} == {"control: the teacher trained on", "linspec"}
    assert not made_up and not plan.out.exists()


@pytest.mark.parametrize(
    ("plain", "aug", "told"),
    [
        ([4.0], [3.0], "| same |"),
        ([4.0], [5.0], "| differs |"),
        ([4.0, 4.2], [3.0, 3.2], "| same |"),
        ([4.0, 4.2], [3.0, 4.1], "| same |"),
        ([4.0, 4.2], [3.0, 4.3], "| same, not in every seed |"),
        ([4.0, 4.2], [4.1, 3.9], "| same, not in every seed |"),
        ([4.0, 4.2], [3.9, 5.0], "| differs, not in every seed |"),
        # a seed that only one of them has counts for neither
        ([4.0, 2.0], [3.0], "| same |"),
        ([4.0], [], "| not measured yet |"),
    ],
)
def test_seeds_that_disagree_are_said(plain: list[float], aug: list[float], told: str) -> None:
    done = [
        (Cell(table="quality", row="local", column=part, seed=seed), {"perplexity": value})
        for part, values in ((PLAIN, plain), (AUG, aug))
        for seed, value in enumerate(values)
    ]
    line = next(line for line in comparison(Results(done)).splitlines() if "| aug / local" in line)
    assert line.endswith(told)
