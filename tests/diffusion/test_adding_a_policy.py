"""The worked example of docs/adding-a-diffusion-policy.md, and policies that break their rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import PROMPTS, WHOLE, make, tokens

from linspec.diffusion import BLOCKS, CACHES, COMMITS, STOPS, VERIFIES
from linspec.diffusion.blocks import FixedBlocks
from linspec.diffusion.caches import DualCache
from linspec.diffusion.commits.static import Static
from linspec.diffusion.freedave import FreeDave
from linspec.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-diffusion-policy.md"


@pytest.fixture
def example() -> Iterator[str]:
    """The policy that the page's block registers, as long as a test lasts."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    before = set(COMMITS.names())
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), {"__name__": "worked_example"})
    (name,) = set(COMMITS.names()) - before
    yield name
    COMMITS.forget(name)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_the_worked_example_goes_from_left_to_right(example: str, name: str) -> None:
    left = tokens(name, "block=fixed:5,commit=static:order=left")
    assert tokens(name, f"block=fixed:5,commit={example}:1.0") == left
    _, forwards = tokens(name, f"block=fixed:5,commit={example}:least=0.2")
    assert sum(forwards) < sum(left[1])
    with pytest.raises(ConfigError, match="least must be above 0 and at most 1, got 2"):
        make(name, f"commit={example}:2")


def test_the_page_names_every_policy() -> None:
    page = (PAGE.parent / "diffusion.md").read_text(encoding="utf-8")
    for registry in (BLOCKS, COMMITS, STOPS, CACHES, VERIFIES):
        assert all(f"`{entry.name}`" in page for entry in registry)


@pytest.mark.parametrize(
    ("policy", "method", "answer", "message"),
    [
        (FixedBlocks, "length", 0, "block policy 'fixed' answered 0; a block has 1"),
        (FixedBlocks, "length", 1.5, "block policy 'fixed' answered 1.5"),
        (Static, "commit", torch.tensor([True]), "a boolean for each of 5 candidates"),
        (Static, "commit", torch.zeros(5, dtype=torch.bool), "one of them true"),
        (Static, "commit", None, "commit policy 'static' must answer"),
        (DualCache, "rows", [4, 99], "cache policy 'dual' answered .*99"),
        (DualCache, "rows", range(3, 4), "cache policy 'dual' answered .* before anything is kept"),
        (FreeDave, "ahead", -1, "verify policy 'freedave' answered -1; a canvas has 0 drafts"),
        (FreeDave, "ahead", None, "verify policy 'freedave' answered None; a canvas"),
        (FreeDave, "follows", 4, "'freedave' answered 4; it goes on with one of 3 drafts"),
        (FreeDave, "follows", True, "'freedave' answered True; it goes on with one of 3"),
    ],
    ids=str,
)
def test_an_answer_that_breaks_a_rule_names_the_policy(
    monkeypatch: pytest.MonkeyPatch, policy: Any, method: str, answer: Any, message: str
) -> None:
    monkeypatch.setattr(policy, method, lambda *given: answer)
    llm = make(spec="block=fixed:5,commit=static,cache=dual,verify=freedave")
    (failed,) = llm.generate([PROMPTS[0]], WHOLE, return_errors=True)
    assert isinstance(failed.error, ConfigError)
    assert re.search(message, str(failed.error)), failed.error
    assert not llm.engine.busy
