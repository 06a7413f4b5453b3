"""The foreseen end: traces of the plain loop, nothing lost by a wrong guess, and no state beyond the cut."""

from __future__ import annotations

from typing import Any

import pytest
from denoisers import PROMPTS, WHOLE, assert_traced, make, source, tokens
from plain_denoising import Trace, denoise
from plain_diffusion import CONFIGS

from linspec import SamplingParams
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.stops import ForeseenEnd
from linspec.errors import ConfigError


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How many positions each cut dropped, and whether an end was decided by then."""
    found, plain = list[tuple[int, bool]](), Canvas.cut

    def cut(self: Canvas, length: int) -> int:
        found.append((len(self) - length, length - 1 not in self.undecided))
        return plain(self, length)

    monkeypatch.setattr(Canvas, "cut", cut)
    return found


def common(name: str) -> list[int]:
    """Tokens that a model writes early, as ends of texts."""
    texts, _ = tokens(name, "block=fixed:5,commit=threshold:0.3")
    return sorted({text[place] for text in texts for place in (1, 4, 7)})


@pytest.mark.crossed(3)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, cuts: list[tuple[int, bool]], name: str, cache: str
) -> None:
    for ending in common(name)[:6]:
        params = SamplingParams(max_tokens=13, ignore_eos=True, stop_token_ids=(ending,))
        for block, least in ((5, 0.05), (32, 0.2)):

            def plain(
                prompt: list[int], block: int = block, least: float = least, ending: int = ending
            ) -> Trace:
                rule: Any = {"rule": "threshold", "number": 0.3, "cache": cache}
                rule |= {"cut": least, "ending": ending}
                return denoise(source(name)[1], prompt, 13, block=block, **rule)

            spec = (
                f"block=fixed:{block},commit=threshold:0.3,cache={cache},stop=foreseen-end:{least}"
            )
            assert_traced(monkeypatch, name, spec, plain, params)
    assert {decided for _, decided in cuts} == {True, False}


@pytest.mark.parametrize("name", CONFIGS)
def test_without_an_end_it_is_end_of_text(name: str) -> None:
    for cache in ("none", "dual"):
        rest = f"block=fixed:5,commit=threshold:0.3,cache={cache}"
        expected = tokens(name, rest)
        assert tokens(name, f"{rest},stop=foreseen-end") == expected


def test_a_guess_that_does_not_come_true_costs_no_text(
    monkeypatch: pytest.MonkeyPatch, cuts: list[tuple[int, bool]]
) -> None:
    def cuts_early(self: ForeseenEnd, canvas: Canvas, *given: object) -> int:
        return canvas.start + 2 if len(canvas) > canvas.start + 2 else len(canvas)

    monkeypatch.setattr(ForeseenEnd, "cuts", cuts_early)
    for cache in ("none", "dual"):
        spec = f"block=fixed:5,commit=threshold:0.3,cache={cache},stop=foreseen-end"
        for batch in (1, 4):
            found = make("dream", spec, max_batch=batch).generate(PROMPTS, WHOLE)
            assert [len(each.token_ids) for each in found] == [13] * len(PROMPTS)
            assert all(each.finish_reason == "length" for each in found)
    assert cuts


@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(cuts: list[tuple[int, bool]], name: str) -> None:
    spec = "block=fixed:5,commit=threshold:0.3,cache=dual,stop=foreseen-end:0.05"
    asked = [
        SamplingParams(
            max_tokens=count,
            temperature=heat,
            seed=count,
            ignore_eos=True,
            stop_token_ids=tuple(common(name)),
            min_tokens=least,
        )
        for count, heat, least in ((13, 0.0, 0), (12, 0.9, 5), (20, 1.3, 2), (1, 0.0, 0))
    ]
    alone, together = (
        make(name, spec, max_batch=batch).generate(PROMPTS, asked) for batch in (1, 4)
    )
    assert [e.token_ids for e in together] == [e.token_ids for e in alone]
    assert [e.stats.computed for e in together] == [e.stats.computed for e in alone]
    assert all(len(e.token_ids) > p.min_tokens for e, p in zip(alone, asked, strict=True))
    assert cuts


@pytest.mark.parametrize("answer", [None, 3, 99, 4.0], ids=str)
def test_an_answer_that_breaks_a_rule_names_the_policy(
    monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setattr(ForeseenEnd, "cuts", lambda *given: answer)
    llm = make(spec="stop=foreseen-end")
    (failed,) = llm.generate([PROMPTS[0]], WHOLE, return_errors=True)
    assert isinstance(failed.error, ConfigError)
    assert "stop policy 'foreseen-end' keeps" in str(failed.error)


def test_a_threshold_that_means_nothing_is_named() -> None:
    for least in (0, 1.5):
        with pytest.raises(ConfigError, match=f"least must be above 0 and at most 1, got {least}"):
            make(spec=f"stop=foreseen-end:{least}")
