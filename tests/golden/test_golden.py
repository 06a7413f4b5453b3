"""Outputs are those of the golden file: to the bit where it was made, nearly so on other machines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from linspec.mixers import MIXERS

from .cases import SAMPLING, Bench, Case, cases, difference, fingerprint_of_machine
from .make import read

GOLDEN = read()
CASES = list(cases(GOLDEN["models"]))
SMALL = {name for name, model in GOLDEN["models"].items() if model["kind"] != "decoder"}
FAST = [
    c for i, c in enumerate(CASES) if i % 7 == 0 or c.model in SMALL or c.verifier != "lossless"
]
# on other machines: how far a logprob may be off, and which share of the cases may be further off, as a
# rounded input of a layer with integer weights may fall to the other side
ELSEWHERE, FALLEN = 5e-6, 0.02


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    # as the file was made
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench(GOLDEN["models"], tmp_path_factory.mktemp("golden"))
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def tolerance() -> float:
    here = fingerprint_of_machine()
    if here == GOLDEN["machine"]:
        return 0.0
    if here.startswith("torch "):
        pytest.skip("torch alone adds up in another order: the file is what the kernels compute")
    return ELSEWHERE


def compare(bench: Bench, chosen: list[Case], tolerance: float) -> list[str]:
    """Keys of the cases that came out otherwise; none if they are as few as another machine may have."""
    off = [
        case.key
        for case in chosen
        if not _same(bench.run(case), GOLDEN["cases"][case.key], tolerance)
    ]
    return off if len(off) > (FALLEN * len(chosen) if tolerance else 0) else []


def _same(found: dict[str, Any], golden: dict[str, Any], tolerance: float) -> bool:
    exact = ("refused", "tokens", "rounds")
    if any(found.get(name) != golden.get(name) for name in exact):
        return False
    return difference(found.get("logprobs", []), golden.get("logprobs", [])) <= tolerance


def test_some_of_every_kind_of_case(bench: Bench, tolerance: float) -> None:
    assert compare(bench, FAST, tolerance) == []


@pytest.mark.slow
def test_every_case(bench: Bench, tolerance: float) -> None:
    assert compare(bench, CASES, tolerance) == []


def test_full_forms(bench: Bench, tolerance: float) -> None:
    off = {
        name: difference([bench.forward(name)], [golden])
        for name, golden in GOLDEN["forwards"].items()
    }
    assert {name: each for name, each in off.items() if not each <= tolerance} == {}


def test_the_file_has_every_mixer_and_the_fast_cases_every_choice() -> None:
    mixers = {name for name in MIXERS.names() if not name.startswith(("test", "study-"))}
    assert mixers <= set(GOLDEN["models"])
    assert set(GOLDEN["cases"]) == {case.key for case in CASES}
    for field in ("weights", "cache", "drafter", "sampling"):
        assert {getattr(c, field) for c in FAST} == {getattr(c, field) for c in CASES}
    generating = {case.model for case in CASES}
    assert {case.model for case in FAST} == generating
    assert set(GOLDEN["forwards"]) == set(GOLDEN["models"]) >= generating


def test_the_cases_can_tell_a_change() -> None:
    """A logprob is a finite number below zero, some drafts are accepted, sampling is not greedy."""
    found = GOLDEN["cases"]
    logprobs = [p for case in found.values() for row in case["logprobs"] for p in row]
    assert all(math.isfinite(p) and p <= 0 for p in logprobs)
    for drafter in ("prompt-lookup", "medusa", "draft"):
        rounds = [found[c.key]["rounds"] for c in CASES if c.drafter == drafter]
        assert sum(accepted for pair in rounds for _, accepted in pair) > 100
    pairs = [(c, Case(c.model, c.weights, c.cache, c.drafter, "sampled")) for c in CASES]
    greedy = [(c.key, s.key) for c, s in pairs if c.sampling == "greedy"]
    assert sum(found[a]["tokens"] != found[b]["tokens"] for a, b in greedy) > 0.9 * len(greedy)
    assert set(SAMPLING) == {c.sampling for c in CASES}
