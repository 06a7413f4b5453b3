"""A layer of two mixers has the forms, the state and the outputs of any other."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import model_dir
from helpers import (
    GROUP,
    assert_close,
    feed,
    prefilled,
    random_tokens,
    random_tree,
    remembered,
    tiny_model,
    tree_logits,
)

from guests.proof import check_imports
from linspec import LLM, MIXERS, SamplingParams
from linspec.decoding.step import StepInput
from linspec.mixers.config import MixerConfig

NAME = "guest-two-mixers"
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(autouse=True)
def guest() -> Iterator[None]:
    """Registered as long as a test lasts: others run over all mixers."""
    sys.modules.pop("guests.two_mixers", None)
    importlib.import_module("guests.two_mixers")
    yield
    MIXERS.forget(NAME)


def test_it_imports_public_names_only() -> None:
    check_imports(Path(__file__).with_name("two_mixers.py"))


def layers() -> tuple[MixerConfig, ...]:
    own = MixerConfig(name=NAME, group=GROUP)
    return own, MixerConfig(), own


@pytest.mark.parametrize("length", [0, 1, GROUP, 3 * GROUP + 1])
def test_trees_equal_the_full_form(length: int) -> None:
    model, prompt = tiny_model(*layers()), random_tokens(length)
    for seed in range(4):
        tree, state = random_tree(random.Random(seed), 12), prefilled(model, prompt)
        found = model.step([StepInput.tree(0, tree)], state).logits
        assert_close(found, tree_logits(model, prompt, tree))
        node = len(tree) // 2
        state.commit(0, tree.path_to(node))
        path = [tree.tokens[n] for n in tree.path_to(node)]
        assert_close(
            remembered(model, state), remembered(model, prefilled(model, [*prompt, *path]))
        )


def test_heads_of_one_kind_share_a_state_across_layers() -> None:
    state = tiny_model(*layers()).new_state()
    # the softmax heads of two layers, their grouped heads, the plain softmax layer
    assert [part.layers for part in state.parts] == [2, 2, 1]
    assert state.bytes_at(90) - state.bytes_at(60) == 30 * 8 * 2 * 4 * (2 * 1 + 2)


def test_a_long_prompt_goes_through_both_parts() -> None:
    model, text = tiny_model(*layers()), random_tokens(100)
    state = model.new_state()
    logits = torch.cat([feed(model, state, text[:70]), feed(model, state, text[70:])])
    with torch.no_grad():
        assert_close(logits, model(torch.tensor([text]))[0])


@pytest.mark.parametrize("drafter", ["prompt-lookup"])
def test_drafts_change_no_output(drafter: str) -> None:
    folder, prompts = model_dir(NAME), ("abcd end abcd end", "the end", "x")
    plain = [each.token_ids for each in LLM(folder).generate(prompts, GREEDY)]
    for batch in (1, 3):
        llm = LLM(folder, drafter=drafter, policy=4, max_batch=batch)
        assert [each.token_ids for each in llm.generate(prompts, GREEDY)] == plain


def test_int8_keeps_the_cache_of_the_part_that_has_one() -> None:
    state = tiny_model(*layers()).new_state(1, "int8")
    assert [part.entries.name for part in state.parts] == ["int8", "float", "int8"]
