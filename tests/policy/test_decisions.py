"""What the automatic policy decides is what it decided when the record was written."""

from __future__ import annotations

import json

import pytest
from decisions import FILE, SCENARIOS, decisions

RECORDED = json.loads(FILE.read_text())


@pytest.mark.parametrize("seed", range(SCENARIOS))
def test_decisions_are_those_on_record(seed: int) -> None:
    assert decisions(seed) == RECORDED[str(seed)]


def test_the_record_can_tell_a_change() -> None:
    """Plain rounds, probes, small and large trees, and rounds in which only some requests draft."""
    rounds = [plan for found in RECORDED.values() for plan in found]
    sizes = {nodes for plan in rounds for nodes in plan}
    assert sizes >= {0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32}
    assert sum(0 < sum(map(bool, plan)) < len(plan) for plan in rounds) > 100
