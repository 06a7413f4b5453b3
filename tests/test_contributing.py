"""The worked examples of CONTRIBUTING.md are real plug-ins, with the proofs of all."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import model_dir
from guests.proof import PROMPTS, check_lossless

from linspec import DRAFTERS, LLM, LOOPS, SamplingParams
from linspec.decoding.step import StepInput
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError
from linspec.mixers import MIXERS
from linspec.mixers.specs import make_mixer
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.utils.registry import Registry

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
GROUP = 4


def worked_example(number: int, registry: Registry[Any]) -> Iterator[str]:
    """The name that the page's block `number` registers, as long as a test lasts."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 4 and all(len(block.splitlines()) <= 40 for block in blocks)
    before = set(registry.names())
    module = ModuleType("worked_example")
    sys.modules[module.__name__] = module
    exec(
        compile(blocks[number], str(PAGE), "exec", dont_inherit=True),
        # dataclasses look for the module of a class
        vars(module),
    )
    (name,) = set(registry.names()) - before
    yield name
    registry.forget(name)
    del sys.modules[module.__name__]


@pytest.fixture(params=[0, 1])
def example(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from worked_example(request.param, MIXERS)


@pytest.fixture
def drafter() -> Iterator[str]:
    yield from worked_example(2, DRAFTERS)


@pytest.fixture
def loop() -> Iterator[str]:
    yield from worked_example(3, LOOPS)


@pytest.mark.parametrize("mixer", ["aug", "softmax"])
def test_worked_loop_is_greedy_decoding(loop: str, mixer: str) -> None:
    params = SamplingParams(max_tokens=12)
    expected = [each.token_ids for each in LLM(model_dir(mixer)).generate(PROMPTS, params)]
    llm = LLM(model_dir(mixer), loop=loop, max_batch=3, prefill_tokens=8)
    assert [each.token_ids for each in llm.generate(PROMPTS, params)] == expected


def test_worked_drafter_is_lossless_and_remembers(drafter: str) -> None:
    check_lossless(f"{drafter}:length=2")


@pytest.mark.parametrize("setting", ["length=0", "length=-1", "memory=-1"])
def test_worked_drafter_refuses_what_it_cannot_use(drafter: str, setting: str) -> None:
    with pytest.raises(
        ConfigError, match=f"drafter '{drafter}:{setting}': length must be 1 or more"
    ):
        DRAFTERS.read(f"{drafter}:{setting}")


@pytest.mark.parametrize("example", [1], indirect=True)
def test_worked_option_of_a_mixer_changes_it_and_is_held_to_its_rule(example: str) -> None:
    assert make_mixer(f"{example}:power=3,group=32").options == {"power": 3.0}
    with pytest.raises(ConfigError, match=f"mixer '{example}:power=0': power must be above 0"):
        make_mixer(f"{example}:power=0")


@pytest.mark.parametrize("taps", [0, 3])
def test_worked_example_is_one_function_in_all_forms(example: str, taps: int) -> None:
    rng = random.Random(0)
    mixer = make_mixer(example, group=GROUP, taps=taps)
    config = DecoderConfig(
        vocab_size=17,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=4,
        mlp_width=24,
        mixers=(mixer, mixer),
    )
    torch.manual_seed(0)
    model = Decoder(config).double().eval()
    for prompt_length in range(1, 2 * GROUP + 1):
        prompt = [rng.randrange(17) for _ in range(prompt_length)]
        state = model.new_state()
        model.step([StepInput(0, prompt)], state)
        state.commit(0, range(prompt_length))
        tree = TokenTree(
            tuple(rng.randrange(17) for _ in range(12)),
            (-1, *(rng.randrange(max(0, i - 2), i) for i in range(1, 12))),
        )
        logits = model.step([StepInput.tree(0, tree)], state).logits
        for node in range(len(tree)):
            path = [tree.tokens[i] for i in tree.path_to(node)]
            full = model(torch.tensor([prompt + path]))[0, -1]
            torch.testing.assert_close(logits[node], full, rtol=0, atol=1e-10)
