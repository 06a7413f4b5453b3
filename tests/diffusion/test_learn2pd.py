"""Learn2PD: traces of the plain loop with the same filter, static in the limit, refusals of other models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import scratch
from denoisers import PROMPTS, WHOLE, assert_traced, make, source, talker, tokens
from plain_denoising import Trace, denoise
from plain_diffusion import CONFIGS

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion
from linspec.diffusion.filters import CommitFilter, load_filter, save_filter
from linspec.errors import CheckpointError, ConfigError

BLOCK = 6


def random_filter(block: int = BLOCK) -> CommitFilter:
    """Its answers are all over the place."""
    made = CommitFilter(block)
    draw = torch.Generator().manual_seed(block)
    for parameter in made.parameters():
        parameter.data = 3 * torch.randn(parameter.shape, generator=draw)
    return made.eval()


@cache
def stored(name: str) -> Path:
    """A random filter of a model."""
    return save_filter(random_filter(), load_diffusion(source(name)[0]), scratch("filter") / name)


def accepts(least: float) -> Callable[[list[float]], list[bool]]:
    made = random_filter()

    def given(confidences: list[float]) -> list[bool]:
        padded = [*confidences, *[1.0] * (BLOCK - len(confidences))]
        with torch.no_grad():
            found: list[bool] = (made(torch.tensor(padded)).sigmoid() > least).tolist()
        return found

    return given


@pytest.mark.parametrize("cached", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, cached: str
) -> None:
    def plain(prompt: list[int]) -> Trace:
        rule: Any = {"rule": "filter", "accepts": accepts(0.7), "cache": cached}
        return denoise(source(name)[1], prompt, 13, block=block, **rule)

    for block in (BLOCK, 4):
        commit = f"learn2pd:least=0.7+path={stored(name)}"
        spec = f"block=fixed:{block},commit={commit},cache={cached}"
        assert_traced(monkeypatch, name, spec, plain)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_filter_that_accepts_nothing_is_static(name: str) -> None:
    heat = SamplingParams(max_tokens=13, temperature=0.8, seed=4, ignore_eos=True)
    # with a logit shift a filter lets a dual cache compute the row before the block along
    for cached in ("none", "dual") if name == "llada" else ("none", "dual:every=1"):
        for params in (WHOLE, heat):
            rest = f"block=fixed:{BLOCK},cache={cached}"
            static = tokens(name, f"{rest},commit=static", params)
            never = f"{rest},commit=learn2pd:least=1.0+path={stored(name)}"
            assert tokens(name, never, params) == static
            some = f"{rest},commit=learn2pd:least=0.5+path={stored(name)}"
            assert sum(tokens(name, some, params)[1]) < sum(static[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(name: str) -> None:
    spec = f"block=fixed:{BLOCK},commit=learn2pd:least=0.5+path={stored(name)},cache=dual"
    asked = [
        SamplingParams(max_tokens=count, temperature=heat, seed=count, ignore_eos=True)
        for count, heat in ((13, 0.0), (6, 0.9), (20, 1.3), (1, 0.0))
    ]
    alone, together = (
        make(name, spec, max_batch=batch).generate(PROMPTS, asked) for batch in (1, 4)
    )
    assert [e.token_ids for e in together] == [e.token_ids for e in alone]
    assert [e.stats.rounds for e in together] == [e.stats.rounds for e in alone]


def test_what_is_saved_is_what_is_loaded_whatever_the_bits_of_the_model() -> None:
    for model in (load_diffusion(source("dream")[0]), make("dream").model):
        found = load_filter(stored("dream"), model)  # type: ignore[arg-type]  # a decoder
        assert found.block == BLOCK
        for name, tensor in random_filter().state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)


def test_a_short_block_has_as_many_weights_as_the_published_one() -> None:
    for block in (4, 8, 16, 32, 64):
        made = CommitFilter(block)
        assert made.inner.weight.numel() == max(1024, block * block)


def test_a_filter_that_says_nothing_of_its_width_is_as_wide_as_its_block(tmp_path: Path) -> None:
    model, old = load_diffusion(source("llada")[0]), CommitFilter(BLOCK, BLOCK)
    config = save_filter(old, model, tmp_path / "f") / "filter.json"
    said = json.loads(config.read_text())
    assert said.pop("width") == BLOCK
    config.write_text(json.dumps(said))
    found = load_filter(tmp_path / "f", model).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in old.state_dict().items())


def test_a_filter_beside_the_model_needs_no_path() -> None:
    folder = talker() / "learn2pd"
    if not folder.exists():
        save_filter(random_filter(), load_diffusion(talker()), folder)
    for bits in (None, 8):
        loop = f"masked-diffusion:block=fixed:{BLOCK},commit=learn2pd:0.5"
        (found,) = LLM(talker(), loop=loop, quantize=bits).generate(
            "abcd", SamplingParams(max_tokens=9, ignore_eos=True)
        )
        assert len(found.token_ids) == 9


def test_a_filter_of_another_model_or_block_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was trained for another model"):
        make("llada", f"commit=learn2pd:path={stored('dream')}")
    with pytest.raises(CheckpointError, match="filter.json is missing; train one"):
        make("llada", f"commit=learn2pd:path={tmp_path}")
    with pytest.raises(ConfigError, match="given in memory has no directory"):
        make("llada", "commit=learn2pd")
    llm = make("llada", f"block=fixed:8,commit=learn2pd:path={stored('llada')}")
    (failed,) = llm.generate([PROMPTS[0]], WHOLE, return_errors=True)
    assert "knows blocks of 6 positions, and this one has 8" in str(failed.error)
    for least in (0, 1.5):
        with pytest.raises(ConfigError, match=f"least must be above 0 and at most 1, got {least}"):
            make("llada", f"commit=learn2pd:least={least}")
    for block in (0, 10**5, "x"):
        with pytest.raises(ConfigError, match="block must be"):
            CommitFilter(block)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 7}, "has shape"),
        ({"width": 7}, "has shape"),
        ({"width": 10**6}, "width must be at most 2048"),
        ({"block": "six"}, "block must be a whole number"),
        ({"block": 10**9}, "block must be at most 2048"),
        ({"format_version": "9.0"}, "install a newer"),
    ],
    ids=str,
)
def test_damaged_files_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = load_diffusion(source("llada")[0])
    folder = save_filter(random_filter(), model, tmp_path / "f")
    config = folder / "filter.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_filter(folder, model)
    folder = save_filter(random_filter(), model, tmp_path / "g")
    (folder / "filter.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_filter(folder, model)
    with pytest.raises(ConfigError, match="`train_filter`"):
        save_filter(random_filter(), model, tmp_path / "g")
