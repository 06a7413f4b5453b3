"""Draft and edit: traces of the plain loop, the threshold it is in the limit, and an end to every block."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from denoisers import PROMPTS, WHOLE, assert_traced, make, source, tokens
from plain_denoising import Trace, denoise
from plain_diffusion import CONFIGS

from linspec import SamplingParams
from linspec.diffusion.canvas import EDITS, Canvas
from linspec.diffusion.commits.draft_and_edit import DraftAndEdit
from linspec.errors import ConfigError

EAGER = "commit=draft-and-edit:least=0.25+keep=0.2"
HEAT = SamplingParams(max_tokens=13, temperature=0.8, seed=4, ignore_eos=True)


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is replaced, in its order."""
    found, plain = list[tuple[int, int]](), Canvas.replace

    def replace(self: Canvas, position: int, token: int) -> None:
        found.append((position, token))
        plain(self, position, token)

    monkeypatch.setattr(Canvas, "replace", replace)
    return found


@pytest.mark.crossed(3)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, edits: list[tuple[int, int]], name: str, cache: str
) -> None:
    expected = list[tuple[int, int]]()

    def plain(prompt: list[int]) -> Trace:
        rule: Any = {"rule": "threshold", "number": 0.25, "keep": 0.2, "cache": cache}
        trace = denoise(source(name)[1], prompt, 13, block=block, **rule)
        expected.extend(trace.edits)
        return trace

    for block in (1, 5, 32):
        assert_traced(monkeypatch, name, f"block=fixed:{block},{EAGER},cache={cache}", plain)
    assert edits == expected and edits


@pytest.mark.crossed(3)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_that_always_stays_is_one_of_the_threshold(name: str, cache: str) -> None:
    for least in (0.2, 1.0):
        for params in (WHOLE, HEAT):
            expected = tokens(name, f"block=fixed:5,commit=threshold:{least},cache={cache}", params)
            spec = f"block=fixed:5,commit=draft-and-edit:least={least}+keep=0,cache={cache}"
            assert tokens(name, spec, params) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(edits: list[tuple[int, int]], name: str) -> None:
    spec = f"block=fixed:4,{EAGER},cache=dual"
    asked = [
        SamplingParams(max_tokens=count, temperature=heat, seed=count, ignore_eos=True)
        for count, heat in ((13, 0.0), (6, 0.9), (20, 1.3), (1, 0.0))
    ]
    alone, together = (
        make(name, spec, max_batch=batch).generate(PROMPTS, asked) for batch in (1, 4)
    )
    assert [e.token_ids for e in together] == [e.token_ids for e in alone]
    assert [e.stats.rounds for e in together] == [e.stats.rounds for e in alone]
    assert [len(e.token_ids) for e in alone] == [13, 6, 20, 1] and edits


def test_a_policy_that_is_never_content_comes_to_an_end(
    monkeypatch: pytest.MonkeyPatch, edits: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(
        DraftAndEdit, "edit", lambda self, decided: torch.ones_like(decided.positions).bool()
    )
    llm = make("dream", f"block=fixed:5,{EAGER}", max_batch=1)
    params = SamplingParams(max_tokens=13, temperature=1.5, seed=3, ignore_eos=True)
    for prompt in PROMPTS:
        edits.clear()
        (found,) = llm.generate([prompt], params)
        assert len(found.token_ids) == 13
        times = Counter(position for position, _ in edits)
        assert max(times.values()) == EDITS
        # each forward decides or replaces something, and the last of each block may do nothing
        assert found.stats.rounds <= 13 * (1 + EDITS) + 3


def test_what_fills_everything_may_be_edited_too() -> None:
    for over in ("mean", "least"):
        stop = f"stop=prophet:early=-9+middle=-9+late=-9+over={over}"
        filled = make("llada", f"block=fixed:5,{EAGER},{stop}").generate(PROMPTS, WHOLE)
        assert all(2 <= each.stats.rounds <= 2 + 2 * 13 for each in filled)
        assert all(len(each.token_ids) == 13 for each in filled)


@pytest.mark.parametrize("answer", [None, torch.tensor([True]), torch.zeros(4)], ids=str)
def test_an_edit_that_breaks_a_rule_names_the_policy(
    monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setattr(DraftAndEdit, "edit", lambda self, decided: answer)
    (failed,) = make(spec=f"block=fixed:4,{EAGER}").generate(
        [PROMPTS[0]], WHOLE, return_errors=True
    )
    assert isinstance(failed.error, ConfigError)
    assert "commit policy 'draft-and-edit' must answer with a boolean" in str(failed.error)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("least=0", "least must be above 0 and at most 1, got 0"),
        ("least=2", "least must be above 0 and at most 1, got 2"),
        ("keep=-0.1", "keep must be from 0 to least, which is 0.5, got -0.1"),
        ("least=0.4+keep=0.6", "keep must be from 0 to least, which is 0.4, got 0.6"),
    ],
)
def test_thresholds_that_mean_nothing_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(spec=f"commit=draft-and-edit:{spec}")
