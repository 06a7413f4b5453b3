"""Logits are computed of what can be decided alone, and that changes no token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
from denoisers import PROMPTS, WHOLE, make, tokens
from plain_diffusion import CONFIGS

from linspec import SamplingParams
from linspec.diffusion.canvas import Canvas
from linspec.engine.loops.masked_diffusion import MaskedDiffusionLoop

SPECS = (
    "block=fixed:5,commit=static,cache=none",
    "block=fixed:5,commit=threshold:0.3,cache=dual:2",
    "block=fixed:5,commit=static:order=random,cache=dkv-greedy:4",
    "block=fixed:5,commit=draft-and-edit,cache=prefix",
    "block=fixed:5,commit=local-leap,cache=none",
    "block=fixed:5,commit=static,verify=freedave:3",
    "block=sliding:4,commit=threshold:0.3,cache=elastic",
    "block=ada-block:length=5+delimiters=1+3+least=0.05,commit=entropy:0.5",
    "block=fixed:5,commit=static,stop=prophet:early=1+middle=1+late=1",
    "block=fixed:5,commit=threshold:0.3,stop=foreseen-end:0.05",
)


def everything(self: MaskedDiffusionLoop, canvas: Canvas) -> Collection[int]:
    """All positions from the block on, decided or not."""
    return range(canvas.start, len(canvas))


@pytest.mark.crossed(4)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_forwards_are_those_with_logits_of_everything(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: str
) -> None:
    heat = SamplingParams(max_tokens=13, temperature=0.9, seed=3, ignore_eos=True)
    asked = (replace(WHOLE, seed=1), heat)
    found = [tokens(name, spec, params) for params in asked]
    monkeypatch.setattr(MaskedDiffusionLoop, "_known", everything)
    assert found == [tokens(name, spec, params) for params in asked]


def read(name: str, spec: str) -> list[tuple[int, int]]:
    """Of each forward: the rows that have logits, and the masks of the block before it."""
    llm = make(name, spec, max_batch=1)
    loop: Any = llm.engine.loop
    step, found = loop._step, list[tuple[int, int]]()

    def looked(forwards: Sequence[Any]) -> Any:
        (forward,) = forwards
        (given,) = forward.given
        found.append((len(given.logits_of), len(forward.of.canvas.open)))
        return step(forwards)

    loop._step = looked
    llm.generate([PROMPTS[0]], WHOLE)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_has_logits_of_the_open_masks(name: str) -> None:
    for spec in ("block=fixed:5,commit=static", "block=fixed:5,commit=static,cache=dual"):
        assert all(rows == masks for rows, masks in read(name, spec))
    # a policy that looks for the end of the text sees the masks behind the block too
    seen = read(name, "block=fixed:5,commit=static,stop=foreseen-end")
    assert any(rows > masks for rows, masks in seen)
