"""Guests: plug-ins outside the tree, one file and one registration line each, that run everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import model_dir
from typer.testing import CliRunner

from guests import beam, client, diffusion, layer_skip, paged_state, soft_prompt, suffix_drafter
from guests.proof import PROMPTS, check_imports, check_lossless
from linspec import DRAFTERS, LLM, LinspecError, SamplingParams
from linspec.cli import app

GUESTS = [beam, client, diffusion, layer_skip, paged_state, soft_prompt, suffix_drafter]


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.__name__)
def test_a_guest_imports_public_names_only(guest: object) -> None:
    check_imports(Path(str(guest.__file__)))  # type: ignore[attr-defined]


def test_the_suffix_drafter_is_lossless_and_remembers() -> None:
    check_lossless("guest-suffix:max_length=3")


@pytest.mark.slow
def test_the_layer_skipping_drafter_is_lossless() -> None:
    check_lossless("guest-layer-skip", remembers=False)
    # with no layer left out it is the target, and every draft is right
    llm = LLM(model_dir("aug"), drafter="guest-layer-skip:every=1", policy=3)
    (found,) = llm.generate("abcd", SamplingParams(max_tokens=13, ignore_eos=True))
    assert found.stats.tokens_per_round == 4.0


def test_the_command_line_takes_a_guest_with_its_options() -> None:
    command = ["generate", str(model_dir("aug")), "--prompt", "abcd end abcd", "--json"]
    command += ["--max-tokens", "12", "--policy", "4"]
    plain = json.loads(CliRunner().invoke(app, command).stdout)
    done = CliRunner().invoke(app, [*command, "--drafter", "guest-suffix:max_length=2,memory=50"])
    assert json.loads(done.stdout)["token_ids"] == plain["token_ids"]
    refused = CliRunner().invoke(app, [*command, "--drafter", "guest-suffix:memory=0"])
    assert refused.exit_code == 1
    assert (
        "drafter 'guest-suffix:memory=0': max_length and memory must be 1 or more" in refused.stderr
    )


def test_a_guest_forgets_what_it_may_not_keep() -> None:
    llm = LLM(model_dir("aug"), drafter="guest-suffix:memory=20", policy=4)
    drafter = llm.engine.drafter
    assert isinstance(drafter, suffix_drafter.SuffixDrafter)
    llm.generate(["abcd end", "the end"], SamplingParams(max_tokens=8))
    assert drafter.known == {} and 0 < len(drafter.followers) <= 20
    # a client that leaves early
    next(llm.stream("abcd", SamplingParams(max_tokens=8)))
    assert drafter.known == {}


def test_a_guest_is_listed() -> None:
    (entry,) = [entry for entry in DRAFTERS if entry.name == "guest-suffix"]
    assert [setting.name for setting in entry.settings] == ["max_length", "memory"]
    with pytest.raises(LinspecError, match="did you mean 'guest-suffix'"):
        DRAFTERS.read("guest-sufix")


@pytest.mark.parametrize("drafter", [None, "guest-suffix", "prompt-lookup"])
def test_a_paged_cache_generates_what_a_plain_one_does(drafter: str | None) -> None:
    plain = LLM(model_dir("softmax"))
    settings = {"drafter": drafter, "policy": 4} if drafter else {}
    for batch in (1, 3):
        paged = LLM(
            model_dir("softmax"), kv_cache_dtype="guest-paged:block=5", max_batch=batch, **settings
        )
        for params in (
            SamplingParams(max_tokens=24, ignore_eos=True),
            SamplingParams(max_tokens=16, temperature=0.9, seed=3),
        ):
            expected = [each.token_ids for each in plain.generate(PROMPTS, params)]
            found = [each.token_ids for each in paged.generate(PROMPTS, params)]
            assert found == expected


def test_a_wrong_option_of_a_guest_cache_is_a_named_error() -> None:
    with pytest.raises(LinspecError, match="block must be 1 or more, got 0"):
        LLM(model_dir("softmax"), kv_cache_dtype="guest-paged:block=0")
    with pytest.raises(LinspecError, match="did you mean 'guest-paged'"):
        LLM(model_dir("softmax"), kv_cache_dtype="guest-page")
