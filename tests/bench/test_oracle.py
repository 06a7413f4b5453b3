"""The oracle's choice against all choices."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linspec.bench.oracle import Judged, oracle

ROUNDS = st.builds(
    lambda accepted, more, draft, step: Judged(
        accepted, accepted + more, draft, step, 1 + accepted + more
    ),
    st.integers(0, 3),
    st.integers(0, 2),
    st.floats(0, 2),
    st.floats(0.5, 4),
)


def curve(nodes: float) -> float:
    return 1 + 0.3 * (nodes - 1)


@given(st.lists(ROUNDS, min_size=1, max_size=4))
def test_no_choice_has_more_tokens_per_second(rounds: list[Judged]) -> None:
    slow = sum(each.step for each in rounds) / sum(curve(each.nodes) for each in rounds)
    best = 0.0
    for taken in product(*(range(each.accepted + 1) for each in rounds)):
        seconds = sum(
            curve(1 + count) + (each.draft / slow * count / each.drafts if count else 0.0)
            for count, each in zip(taken, rounds, strict=True)
        )
        best = max(best, (len(rounds) + sum(taken)) / seconds)
    assert oracle(rounds, curve) == pytest.approx(best)
    assert best >= 1 - 1e-9


def test_what_is_accepted_for_nothing_is_all_gain() -> None:
    free = Judged(accepted=3, drafts=3, draft=0.0, step=1.0, nodes=4)
    assert oracle([free] * 5, lambda nodes: 1.0) == pytest.approx(4.0)
    assert oracle([], curve) == 1.0
