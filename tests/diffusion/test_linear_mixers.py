"""Diffusion models with linear mixers: a plain reference, the loop, all caches, saving, linearizing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import PROMPTS, WHOLE
from plain_denoising import denoise
from plain_diffusion import MASK, VOCAB

from linspec import LLM
from linspec.checkpoints.hub import load_diffusion, save_model
from linspec.decoding.step import StepInput
from linspec.diffusion.base import CACHES, build
from linspec.engine.loops.masked_diffusion import check_sees
from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.mixers.reference import BIDIRECTIONAL, reference
from linspec.mixers.rope import inverse_frequencies
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.linearize import linearize

SIZES = {"group": 4, "span": 2}
AUG = MixerConfig(name="aug", taps=3, kernel="softmax", **SIZES)
MIXERS = (
    AUG,
    MixerConfig(name="aug", taps=3, **SIZES),
    MixerConfig(name="grouped", kernel="softmax", **SIZES),
    MixerConfig(name="hedgehog", **SIZES),
    MixerConfig(name="softmax", taps=3),
)


def model_of(*mixers: MixerConfig) -> MaskedDiffusion:
    config = DiffusionConfig(
        vocab_size=VOCAB, width=32, layers=len(mixers), heads=4, kv_heads=2, head_width=8, mlp_width=48,
        mixers=mixers, mask_id=MASK, logit_shift=1, max_positions=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MaskedDiffusion(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("alpha", "taps")):
                weight.normal_(0.0, 0.3)
    return model.eval()


def ids(count: int) -> list[int]:
    return torch.randint(0, 49, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@torch.no_grad()
def plain(model: MaskedDiffusion, given: list[int]) -> torch.Tensor:
    """Logits of each row, with every mixer by the loops of `mixers/reference.py`."""
    times = torch.arange(len(given))
    angles = torch.outer(times, inverse_frequencies(model.config.rope, 8)).to(model.dtype)
    rope = model.rotary(times, model.dtype)
    x = model.embed(torch.tensor(given))
    for block in model.layers:
        y = block.mixer_norm(x)
        known = block.mixer.mixer.name in BIDIRECTIONAL
        x = x + (reference(block.mixer, y, angles) if known else block.mixer(y[None], rope)[0])
        x = x + block.mlp(block.mlp_norm(x))
    return model.head(model.norm(x))


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: f"{mixer.name}-{mixer.kernel}")
@pytest.mark.parametrize("count", [1, 7, 21])
def test_steps_are_those_of_the_plain_reference(mixer: MixerConfig, count: int) -> None:
    model, given = model_of(mixer, MixerConfig(), mixer), ids(count)
    wanted = plain(model, given)
    torch.testing.assert_close(model(torch.tensor([given]))[0], wanted, rtol=0, atol=1e-4)
    model.to_inference()
    state = model.new_state(2)
    state.hold(1, count)
    step = StepInput(1, given, overwrite=range(count), causal=False, logits_of=range(count))
    found = model.step([step], state).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: f"{mixer.name}-{mixer.kernel}")
def test_a_few_rows_of_one_layer_see_what_others_have_kept(mixer: MixerConfig) -> None:
    """With one layer nothing of the other positions is stale, so a few rows are exact."""
    model = model_of(mixer)
    before, rows = ids(21), [3, 4, 5, 11, 20]
    after = list(before)
    for row in rows:
        after[row] = (after[row] + 7) % 49
    wanted = plain(model, after)[rows]
    model.to_inference()
    state = model.new_state()
    state.hold(0, 21)
    model.step([StepInput(0, before, overwrite=range(21), causal=False)], state)
    some = StepInput(
        0, [after[row] for row in rows], overwrite=rows, causal=False, logits_of=range(len(rows))
    )
    found = model.step([some], state).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_saving_keeps_mixers(tmp_path: Path) -> None:
    model = model_of(AUG, MixerConfig())
    again = load_diffusion(save_model(model, None, tmp_path / "m"))
    assert again.config == model.config
    given = torch.tensor([ids(21)])
    torch.testing.assert_close(again(given), model(given), rtol=0, atol=0)


def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention of all layers, and mixers aug have none"):
        check_sees(model_of(AUG).config, build(CACHES, "elastic"))
    with pytest.raises(ConfigError, match="leave out exact_tokens and softmax_layers"):
        linearize("embedded-diffusion", tmp_path / "out", exact_tokens=64)
    with pytest.raises(ConfigError, match="'gla' has no bidirectional form"):
        model_of(MixerConfig(name="gla"))


class Plain:
    """As the slow loop takes a model: the full form of every layer, again in each forward."""

    def __init__(self, model: MaskedDiffusion) -> None:
        self.model, self.shift, self.layers = model, 1, model.config.layers

    def rows_of(self, text: list[int], rows: list[int], kept: object) -> torch.Tensor:
        return plain(self.model, text)[rows]


def outputs(spec: str, *, batch: int = 8) -> list[tuple[list[int], int, int]]:
    llm = LLM(
        model_of(AUG, MixerConfig(), AUG).double(),
        tokenizer=tiny_tokenizer(),
        loop=f"masked-diffusion:{spec}",
        max_batch=batch,
    )
    found = llm.generate(PROMPTS, WHOLE)
    return [(list(e.token_ids), e.stats.rounds, e.stats.computed) for e in found]


@pytest.mark.parametrize("rule", ["static", "threshold:0.03"])
def test_the_loop_writes_what_the_slow_loop_writes(rule: str) -> None:
    slow, given = Plain(model_of(AUG, MixerConfig(), AUG).double()), rule.partition(":")
    settings = {"rule": given[0], "number": float(given[2] or 0)}
    for prompt, found in zip(PROMPTS, outputs(f"block=fixed:5,commit={rule}"), strict=True):
        trace = denoise(slow, list(prompt), 13, block=5, **settings)
        assert found == (trace.tokens[len(prompt) :], len(trace.forwards), trace.computed)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "dkv:every=3"])
def test_batches_and_drafts_change_no_output(cache: str) -> None:
    spec = f"block=fixed:5,commit=static,cache={cache}"
    alone, drafted = outputs(spec, batch=1), outputs(f"{spec},verify=freedave:3")
    assert alone == outputs(spec)
    assert [each[0] for each in drafted] == [each[0] for each in alone]
    assert all(more[1] <= one[1] for more, one in zip(drafted, alone, strict=True))


def test_prefix_and_dual_that_refresh_always_are_no_cache() -> None:
    none = outputs("block=fixed:5,commit=static")
    for cache in ("prefix:1", "dual:1"):
        assert outputs(f"block=fixed:5,commit=static,cache={cache}") == none
