"""The proof that every guest that drafts must show."""

from __future__ import annotations

import ast
from pathlib import Path

from checkpoints import model_dir

import linspec
from linspec import LLM, SamplingParams

PROMPTS = ("abcd end abcd end", "the end", "cd the abcd the", "x")


def check_lossless(
    spec: str, mixers: tuple[str, ...] = ("aug", "softmax"), *, remembers: bool = True
) -> None:
    """Output with this drafter is output without it, greedy and sampled; and what it remembers helps.

    Drafts that are certain leave sampled outputs as they are, with equal seeds.
    """
    for mixer in mixers:
        for batch in (1, 3):
            _check(LLM(model_dir(mixer), drafter=spec, policy=5, max_batch=batch), mixer, remembers)


def _check(llm: LLM, mixer: str, remembers: bool) -> None:
    plain = LLM(model_dir(mixer))
    for params in (
        SamplingParams(max_tokens=24, ignore_eos=True),
        SamplingParams(max_tokens=16, temperature=0.9, seed=3),
        SamplingParams(max_tokens=16, repetition_penalty=1.3),
    ):
        expected = [each.token_ids for each in plain.generate(PROMPTS, params)]
        # the second time it remembers the first
        passes = [llm.generate(PROMPTS, params) for _ in range(2)]
        for found in passes:
            assert [each.token_ids for each in found] == expected
        if params.ignore_eos:
            first, second = (sum(each.stats.accepted for each in found) for found in passes)
            assert not remembers or (second > 0 and second >= first)


def check_imports(path: Path) -> None:
    """A guest's file imports public names of linspec only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("linspec"):
            assert node.module == "linspec"
            assert {name.name for name in node.names} <= set(linspec.__all__)
