"""AdaBlock: lengths by hand-made logits, traces of the plain loop, and fixed blocks where no line ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import PROMPTS, WHOLE, assert_traced, make, source, talker, tokens
from plain_denoising import Trace, denoise
from plain_diffusion import CONFIGS

from linspec import LLM, SamplingParams
from linspec.diffusion.ada_block import AdaBlock, AdaBlockOptions
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.predictions import Predictions
from linspec.errors import ConfigError

LINE, OTHER, MASK = 0, 1, 3
# ids that random models predict often enough
DELIMITERS = (5, 11, 17, 21, 30, 42, 55)
SPEC = f"delimiters={'+'.join(map(str, DELIMITERS))}+window=0.6+least=0.05"


def length(lines: dict[int, float], count: int = 16, done: int = 0, **options: Any) -> int:
    """Of a block behind `done` positions of `count`; lines: the probability of a line end at some places."""
    policy = AdaBlock(AdaBlockOptions(length=6, least=0.3, **options))
    policy.delimiters, policy.least = {LINE}, 0.3
    rows = torch.tensor([0.0, 0.9, 0.1, 0.0]).repeat(count, 1)
    for place, probability in lines.items():
        rows[place] = torch.tensor([probability, 0.0, 1 - probability, 0.0])
    canvas = Canvas([OTHER] * 4, count, MASK)
    for position in range(4, 4 + done):
        canvas.decide(position, OTHER)
    canvas.start += done
    predictions = Predictions(range(4, 4 + count), rows.log(), 0, MASK)
    return policy.length(canvas, predictions)


def test_a_block_ends_with_the_likeliest_line_end_in_the_window() -> None:
    assert length({}) == 6
    # not the likeliest token of its place, or not likely enough
    assert length({2: 0.45}) == length({2: 0.29}) == 6
    assert length({2: 0.6}) == 3 and length({0: 0.6}) == 1
    # the window is a quarter: 4 positions
    assert length({3: 0.6}) == 4 and length({4: 0.9}) == 6
    assert length({1: 0.6, 3: 0.9}) == 4 and length({1: 0.9, 3: 0.6}) == 2
    assert length({1: 0.6, 3: 0.9}, pick="first") == 2
    assert length({1: 0.9, 3: 0.6}, shortest=3) == 4 and length({1: 0.9}, shortest=8) == 8
    # a window as long as the output makes blocks longer than usual ones
    assert length({13: 0.8}, window=1.0) == 14
    # what is left is shorter than the window
    assert length({15: 0.8}, done=14) == 2 and length({}, done=14) == 6
    # a share that is less than one position
    assert length({0: 0.9}, count=3) == 6


def sizes(prompt: list[int], start: int, at: dict[int, torch.Tensor]) -> int:
    """The published rule over logits by position, for 13 positions of output."""
    best, found = 0.0, 4
    for position in range(start, min(start + int(0.6 * 13), len(prompt) + 13)):
        probabilities = at[position].double().softmax(-1)
        likely = float(probabilities.max())
        if int(probabilities.argmax()) in DELIMITERS and likely >= 0.05 and likely > best:
            best, found = likely, position - start + 1
    return found


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, cache: str
) -> None:
    blocks = set[int]()

    def plain(prompt: list[int]) -> Trace:
        rule: Any = {"rule": "threshold", "number": 0.3, "cache": cache}
        expected = denoise(source(name)[1], prompt, 13, block=sizes, **rule)
        blocks.update(expected.blocks)
        assert sum(expected.blocks) == 13
        return expected

    spec = f"block=ada-block:length=4+{SPEC},commit=threshold:0.3,cache={cache}"
    assert_traced(monkeypatch, name, spec, plain)
    assert len(blocks) > 2


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_threshold_that_is_never_reached_makes_fixed_blocks(name: str, cache: str) -> None:
    rest = f"commit=threshold:0.3,cache={cache}"
    heat = SamplingParams(max_tokens=13, temperature=0.8, seed=4, ignore_eos=True)
    for params in (WHOLE, heat):
        expected = tokens(name, f"block=fixed:5,{rest}", params)
        ada = "block=ada-block:length=5+delimiters=3+4+least=1.0"
        assert tokens(name, f"{ada},{rest}", params) == expected


def test_a_tokenizer_says_which_tokens_end_a_line() -> None:
    def delimiters(spec: str) -> set[int]:
        loop: Any = LLM(talker(), loop=f"masked-diffusion:block=ada-block{spec}").engine.loop
        return set(loop.block.delimiters)

    llm = LLM(talker())
    ends = {i for i in range(llm.model.config.vocab_size) if llm.tokenizer.decode([i]) == "\n"}
    assert ends and delimiters("") == ends
    assert delimiters(":ends=true") == ends | {0}
    assert delimiters(":delimiters=7+9") == {7, 9}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("least=0", "least must be above 0 and at most 1, got 0"),
        ("least=1.01", "least must be above 0 and at most 1, got 1.01"),
        ("window=0", "window must be above 0 and at most 1"),
        ("window=2", "window must be above 0 and at most 1"),
        ("length=0", "length must be 1 or more"),
        ("shortest=0", "shortest must be 1 or more"),
        ("pick=last", "pick must be one of best, first"),
        ("delimiters=a", "delimiters must be ids such as 198 or 198.13, got 'a'"),
        ("delimiters=3+99", "delimiters name token 99, but the model has 61 tokens"),
    ],
)
def test_what_its_spec_may_not_say_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(spec=f"block=ada-block:{spec}")


def test_a_tokenizer_without_lines_asks_for_other_delimiters() -> None:
    # of the tiny tokenizer the first 61 tokens, which this model has, are no line ends
    with pytest.raises(ConfigError, match="no token that ends one; name others"):
        make(spec="block=ada-block")


@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(name: str) -> None:
    spec = f"block=ada-block:{SPEC},commit=threshold:0.3,cache=dual"
    asked = [
        SamplingParams(max_tokens=count, temperature=heat, seed=count, ignore_eos=True)
        for count, heat in ((13, 0.0), (6, 0.9), (20, 1.3), (1, 0.0))
    ]
    alone, together = (
        make(name, spec, max_batch=batch).generate(PROMPTS, asked) for batch in (1, 4)
    )
    assert [e.token_ids for e in together] == [e.token_ids for e in alone]
    assert [e.stats.rounds for e in together] == [e.stats.rounds for e in alone]
