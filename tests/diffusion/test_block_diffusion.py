"""Block diffusion: tokens see their own block and those before it; caches of finished blocks are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import PROMPTS, WHOLE, assert_traced, make, source, tokens
from plain_denoising import Trace, denoise
from plain_diffusion import SDAR
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.cli import app
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError
from linspec.kernels.cpu.library import load

UNIT = SDAR["block_size"]


def aligned(size: int) -> object:
    """A block ends where one of the model's does, if that is first."""
    return lambda prompt, start, at: min(size, (start // UNIT + 1) * UNIT - start)


@pytest.mark.parametrize("size", [3, 32])
@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize(("rule", "number"), [("static", 0), ("threshold", 0.2)])
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, size: int, cache: str, rule: str, number: float
) -> None:
    def plain(prompt: list[int]) -> Trace:
        given = {"block": aligned(size), "rule": rule, "number": number, "cache": cache}
        return denoise(source("sdar")[1], prompt, 13, **given)  # type: ignore[arg-type]

    commit = rule if rule == "static" else f"{rule}:{number}"
    spec = f"block=fixed:{size},commit={commit},cache={cache}"
    assert_traced(monkeypatch, "sdar", spec, plain)


@pytest.mark.parametrize("commit", ["static", "threshold:0.2", "factor:1.5"])
@pytest.mark.parametrize("masks", [256, 6])
def test_the_cache_of_blocks_changes_nothing_and_computes_each_position_once_more(
    commit: str, masks: int
) -> None:
    shared = f"commit={commit},masks={masks}"
    expected, forwards = tokens("sdar", f"{shared},cache=none")
    assert tokens("sdar", f"{shared},cache=blocks") == (expected, forwards)
    alone = [
        make("sdar", f"{shared},cache=blocks", max_batch=1).generate([p], WHOLE) for p in PROMPTS
    ]
    assert [found[0].token_ids for found in alone] == expected


def test_a_block_costs_no_more_the_longer_the_text_is() -> None:
    llm = make("sdar", "commit=static,cache=blocks", max_batch=1)
    params = SamplingParams(max_tokens=4 * UNIT, ignore_eos=True)
    (short,) = llm.generate([[5, 9, 14, 3]], params)
    (long,) = llm.generate([[5, 9, 14, 3] * 10], params)
    # the prompt is computed once
    assert long.stats.computed - short.stats.computed == 36 * SDAR["num_hidden_layers"]


def test_drafts_give_the_output_without_them() -> None:
    for cache in ("none", "dual", "blocks"):
        expected, forwards = tokens("sdar", f"commit=static,cache={cache}")
        found, fewer = tokens("sdar", f"commit=static,cache={cache},verify=freedave:4")
        assert found == expected and all(a <= b for a, b in zip(fewer, forwards, strict=True))


def test_steps_saw_later_blocks() -> None:
    _, plain = source("sdar")
    model = make("sdar").model
    state = model.new_state()
    ids = [5, 9, 14, 3, 8, 8, 30, 2, 1, 40]
    state.hold(0, len(ids))
    everything = StepInput(0, ids, overwrite=range(len(ids)), causal=False)
    expected = plain.logits(ids)
    torch.testing.assert_close(model.step([everything], state).logits, expected, rtol=0, atol=1e-5)
    own = StepInput(0, ids[4:8], overwrite=range(4, 8), causal=False)
    torch.testing.assert_close(model.step([own], state).logits, expected[4:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_block_alone_has_the_bits_of_the_whole_text_in_one_call(bits: int | None) -> None:
    model = LLM(source("sdar")[0], tokenizer=tiny_tokenizer(), quantize=bits).model
    if load().library is None:
        pytest.skip(load().reason)
    ids = [index * 7 % 50 for index in range(5 * UNIT - 1)]
    whole, by_block = model.new_state(), model.new_state()
    for state in (whole, by_block):
        state.hold(0, len(ids))
    everything = StepInput(0, ids, overwrite=range(len(ids)), causal=False)
    assert model.native is not None and model.native.takes([everything])
    expected = model.step([everything], whole).logits
    for first in range(0, len(ids), UNIT):
        rows = range(len(ids))[first : first + UNIT]
        own = StepInput(0, ids[first : first + UNIT], overwrite=rows, causal=False)
        assert torch.equal(model.step([own], by_block).logits, expected[rows])


def test_what_looks_at_whole_texts_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="use cache=blocks"):
        make("sdar", "block=sliding:4,cache=elastic")
    with pytest.raises(ConfigError, match="use cache=dual"):
        make("llada", "cache=blocks")


def test_it_is_decoded_by_blocks_without_a_word(tmp_path: Path) -> None:
    llm = make("sdar")
    assert llm.engine.loop.cache.name == "blocks"
    said = CliRunner().invoke(app, ["info", str(source("sdar")[0]), "--json"])
    assert said.exit_code == 0 and f'"block_length": {UNIT}' in said.stdout
