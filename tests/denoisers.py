"""Random diffusion models in float64 that decode, and what is seen of them while they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import scratch, tiny_tokenizer
from helpers import randomise
from plain_denoising import Trace
from plain_diffusion import BLOCK_CONFIGS, CONFIGS, MASK, PlainModel, write
from transformers import PreTrainedTokenizerFast

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion, save_model
from linspec.diffusion.canvas import Canvas
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion

PROMPTS = [[5, 9, 14], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11], [50, 40, 30, 20]]
WHOLE = SamplingParams(max_tokens=13, ignore_eos=True)


@cache
def source(name: str) -> tuple[Any, PlainModel]:
    """A directory of random weights, and the same in plain torch, in float64."""
    folder = scratch("diffusion") / name
    plain = write(folder, {**CONFIGS, **BLOCK_CONFIGS}[name])
    plain.tensors = {key: tensor.double() for key, tensor in plain.tensors.items()}
    return folder, plain


def make(name: str = "llada", spec: str = "", **settings: Any) -> LLM:
    """In float64, so that no near tie depends on the order of sums."""
    model = load_diffusion(source(name)[0], dtype=torch.float64)
    loop = f"masked-diffusion:{spec}" if spec else "auto"
    return LLM(model, tokenizer=tiny_tokenizer(), loop=loop, **settings)


@cache
def talker() -> Path:
    """A directory with a tokenizer and a template, in float32; the mask token ends the vocabulary."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|eos|>"
    )
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }}{% endfor %}"
    config = DiffusionConfig(
        vocab_size=len(tokenizer) + 1,
        mask_id=len(tokenizer),
        family="Dream",
        logit_shift=1,
        qkv_bias=True,
        eos_ids=(0,),
        bos_id=0,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=48,
    )
    model = randomise(MaskedDiffusion(config), 0).float()
    return save_model(model, tokenizer, scratch("diffusion-talker") / "m")


@contextmanager
def decided(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Positions and tokens in the order in which they are decided."""
    found: list[tuple[int, int]] = []
    plain = Canvas.decide

    def decide(self: Canvas, position: int, token: int) -> None:
        assert self.tokens[position] == MASK and position >= self.prompt_length
        found.append((position, token))
        plain(self, position, token)

    with monkeypatch.context() as patched:
        patched.setattr(Canvas, "decide", decide)
        yield found


def tokens(name: str, spec: str, params: SamplingParams = WHOLE) -> tuple[list[Any], list[int]]:
    """Outputs and forwards of all prompts."""
    found = make(name, spec).generate(PROMPTS, params)
    return [each.token_ids for each in found], [each.stats.rounds for each in found]


def assert_traced(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spec: str,
    plain: Callable[[list[int]], Trace],
    params: SamplingParams = WHOLE,
) -> None:
    """Each prompt alone is decided in the order of the plain loop, and counted as it counts."""
    llm = make(name, spec, max_batch=1)
    for prompt in PROMPTS[:3]:
        expected = plain(prompt)
        with decided(monkeypatch) as found:
            (result,) = llm.generate([prompt], params)
        assert list(result.token_ids) == expected.tokens[len(prompt) :]
        assert found == [each for forward in expected.forwards for each in forward]
        stats, forwards = result.stats, len(expected.forwards)
        assert (stats.rounds, stats.computed) == (forwards, expected.computed)
        assert stats.tokens_per_round == pytest.approx(len(found) / forwards)
        assert result.to_json()["computed"] == expected.computed
