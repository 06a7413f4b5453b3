"""Prophet: the trajectory is that of the loop without it up to the forward that fills the rest."""

from __future__ import annotations

import pytest
from denoisers import PROMPTS, WHOLE, decided, make, tokens
from plain_diffusion import EOS

from linspec import SamplingParams

STATIC = "block=fixed:5,commit=static"


def spec(gap: float, over: str = "mean") -> str:
    return f"{STATIC},stop=prophet:early={gap}+middle={gap}+late={gap}+over={over}"


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_gap_that_never_comes_changes_nothing_and_none_is_one_forward(name: str) -> None:
    assert tokens(name, spec(1e9)) == tokens(name, STATIC)
    for over in ("mean", "least"):
        filled, forwards = tokens(name, spec(-1e9, over))
        assert forwards == [1] * len(PROMPTS)
        assert filled == tokens(name, "block=fixed:none,commit=static:steps=1")[0]


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_what_is_decided_before_the_exit_is_what_would_have_been(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    exits = []
    for prompt in PROMPTS:
        with decided(monkeypatch) as plain:
            make(name, STATIC).generate([prompt], WHOLE)
        before = 0
        # smaller gaps never exit later
        for gap in (-1e9, 0.3, 0.6, 1.0, 1e9):
            with decided(monkeypatch) as found:
                (result,) = make(name, spec(gap)).generate([prompt], WHOLE)
            forwards = result.stats.rounds
            assert found[: forwards - 1] == plain[: forwards - 1]
            assert len(found) == len(plain) and before <= forwards
            before = forwards
            exits.append(forwards)
    assert any(1 < forwards < 13 for forwards in exits)


def test_it_looks_only_when_all_that_is_left_was_computed() -> None:
    asked = spec(0.5)
    for cache in ("none", "prefix"):
        found = make("llada", f"{asked},cache={cache}").generate(PROMPTS, WHOLE)
        assert sum(each.stats.rounds for each in found) < 13 * len(PROMPTS)
    # a dual cache computes everything at the start of a block alone: 1, 6, 11
    for each in make("llada", f"{asked},cache=dual").generate(PROMPTS, WHOLE):
        assert each.stats.rounds in (1, 6, 11, 12, 13)


def test_what_fills_the_rest_keeps_the_rules_of_the_request() -> None:
    llm = make(spec=spec(-1e9))
    asked = {"max_tokens": 13, "allowed_token_ids": (3, 4, EOS), "min_tokens": 9}
    for heat in (0.0, 1.0):
        params = SamplingParams(**asked, temperature=heat, seed=1)
        for each in llm.generate(PROMPTS, params):
            assert set(each.token_ids) <= {3, 4, EOS} and EOS not in each.token_ids[:9]
            assert each.stats.rounds == 1
