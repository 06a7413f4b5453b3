"""What `linspec list --measure` finds and keeps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from linspec.bench import mixers
from linspec.cli.plugins import catalogue


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_every_mixer_is_measured_and_remembered(private_cache: Path) -> None:
    assert mixers.measured_mixers() == {}
    found = mixers.measure_mixers(context=70)
    own = {each["name"] for each in catalogue()["mixers"] if "causal" in each["direction"]}
    assert {name for name in own if not name.startswith(("test", "study-", "guest"))} <= set(found)
    assert mixers.measured_mixers() == found
    shown = {each["name"]: each["us"] for each in catalogue(found)["mixers"]}
    assert {name: shown[name] for name in found} == found
    assert "us" not in catalogue()["mixers"][0]


def test_a_layer_is_the_difference_of_two_stacks() -> None:
    ticks = itertools.count()
    assert mixers.layer_seconds("aug", 20, lambda: next(ticks)) == 0.0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"us": 3, "on": 1}', '{"us": {"aug": 1}, "on": {}}']
)
def test_what_is_damaged_or_of_another_machine_is_not_shown(text: str, private_cache: Path) -> None:
    (private_cache / "mixers.json").write_text(text)
    assert mixers.measured_mixers() == {}
    here = {"us": {"aug": 1}, "on": mixers._here()}
    (private_cache / "mixers.json").write_text(json.dumps(here))
    assert mixers.measured_mixers() == {"aug": 1.0}
