"""Masked diffusion behind the verbs that write text: generate, chat and serve, without a verb of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from denoisers import talker
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.cli import app
from linspec.errors import ConfigError, UnsupportedModel

SPEC = "masked-diffusion:block=fixed:8,commit=local-leap:sure=0.3+near=0.1,cache=dual"


def run(*args: str, given: str = "") -> str:
    result = CliRunner().invoke(app, list(args), input=given)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("loop", ["auto", SPEC])
def test_generate_and_chat_answer_what_the_library_does(loop: str) -> None:
    expected = LLM(talker(), loop=loop).generate("abcd", SamplingParams(max_tokens=12))[0]
    shared = [str(talker()), "--loop", loop, "--max-tokens", "12"]
    said = json.loads(run("generate", *shared, "--prompt", "abcd", "--json"))
    assert said["token_ids"] == list(expected.token_ids)
    assert said["computed"] == expected.stats.computed
    # the template of the directory is the text alone
    assert expected.text.strip()[:4] in run("chat", *shared, given="abcd\n")


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_few_bits_write_too(bits: int) -> None:
    llm = LLM(talker(), quantize=bits)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for each in llm.generate(["abcd", "the end"], params):
        assert len(each.token_ids) == 12


def test_info_speaks_of_a_vocabulary_of_any_size_and_offers_no_drafter() -> None:
    said = json.loads(run("info", str(talker()), "--json"))
    assert (said["decodes_by"], said["drafters"]) == ("masked diffusion", [])


def test_what_does_not_go_with_it_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no drafter"):
        LLM(talker(), drafter="prompt-lookup")
    # what a server asks for when it is told nothing
    llm = LLM(talker(), drafter="auto", prefix_cache="1MB", tbt_ms=50)
    assert llm.engine.drafter is None and llm.engine.scheduler.budget.times is None
    assert llm.generate("abcd", SamplingParams(max_tokens=3))[0].error is None
    for verb in (
        ("bench", "speed", str(talker())),
        ("bench", "drafters", str(talker())),
        ("train-drafter", str(talker()), "--out", str(tmp_path / "d")),
        ("quantize", str(talker()), "--out", str(tmp_path / "q")),
        ("convert", str(talker()), str(tmp_path / "m.gguf")),
        ("eval", "recall", str(talker())),
        ("eval", "repeats", str(talker())),
        ("eval", "positions", str(talker())),
        ("eval", "continuations", str(talker())),
    ):
        result = CliRunner().invoke(app, list(verb))
        assert result.exit_code == 1, result.output
        assert "'diffusion'" in result.output
    with pytest.raises(UnsupportedModel, match="'diffusion'"):
        LLM(talker(), drafter=f"draft-model:{talker()}")


def test_a_batch_in_float32_is_what_each_is_alone() -> None:
    texts = ["abcd", "the end of the end", "x", "cd cd"]
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)
    alone = [LLM(talker(), loop=SPEC, max_batch=1).generate(text, params)[0] for text in texts]
    together = LLM(talker(), loop=SPEC, max_batch=4).generate(texts, params)
    torch.testing.assert_close(
        [list(each.token_ids) for each in together], [list(each.token_ids) for each in alone]
    )
