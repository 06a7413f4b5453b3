"""The worked example of CONTRIBUTING.md is a real mixer that passes the proof of all mixers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from linspec.config import DecoderConfig, MixerConfig
from linspec.mixers import MIXERS
from linspec.models.decoder import Decoder
from linspec.step import Feed
from linspec.tree import TokenTree

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
GROUP = 4


@pytest.fixture
def example() -> Iterator[str]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 1
    before = set(MIXERS.names())
    exec(compile(blocks[0], str(PAGE), "exec"), {"__name__": "worked_example"})
    (name,) = set(MIXERS.names()) - before
    yield name
    MIXERS.forget(name)


@pytest.mark.parametrize("taps", [0, 3])
def test_worked_example_is_one_function_in_all_forms(example: str, taps: int) -> None:
    rng = random.Random(0)
    mixer = MixerConfig(name=example, group=GROUP, taps=taps)
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
        model.step([Feed(0, prompt)], state)
        state.commit(0, range(prompt_length))
        tree = TokenTree(
            tuple(rng.randrange(17) for _ in range(12)),
            (-1, *(rng.randrange(max(0, i - 2), i) for i in range(1, 12))),
        )
        logits = model.step([Feed.tree(0, tree)], state).logits
        for node in range(len(tree)):
            path = [tree.tokens[i] for i in tree.path_to(node)]
            full = model(torch.tensor([prompt + path]))[0, -1]
            torch.testing.assert_close(logits[node], full, rtol=0, atol=1e-10)
