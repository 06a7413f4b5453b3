"""Elastic-Cache: a plain loop with all that is kept spelled out, its limits, and counts of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import PROMPTS, WHOLE, decided, make, source, tokens
from plain_diffusion import CONFIGS, EOS, MASK
from plain_elastic import denoise
from torch import Tensor

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion
from linspec.decoding.step import Look
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.elastic import Drift, Elastic
from linspec.errors import ConfigError
from linspec.models.block import Block

SLIDING = "block=sliding:5,commit=threshold:0.3"
SPECS: dict[str, dict[str, Any]] = {
    "elastic": {"gamma": 0.9},
    "elastic:0.98": {"gamma": 0.98},
    "elastic:gamma=0.98+tracked=3": {"gamma": 0.98, "tracked": 3},
    "elastic:gamma=0.97+over=heads": {"gamma": 0.97, "over": "heads"},
    "elastic:gamma=0.95+masks=all": {"gamma": 0.95, "masks": "all"},
    "elastic:gamma=1": {"gamma": 1.0},
    "elastic:gamma=-1.01": {"gamma": -1.01},
}


@pytest.fixture
def boundaries(monkeypatch: pytest.MonkeyPatch) -> list[Drift]:
    """The watches of all forwards."""
    found, plain = list[Drift](), Elastic.watch

    def watch(self: Elastic, canvas: Canvas, rows: Sequence[int]) -> Drift:
        found.append(plain(self, canvas, rows))
        return found[-1]

    monkeypatch.setattr(Elastic, "watch", watch)
    return found


def boundary(drift: Drift, layers: int = 3) -> int:
    return layers if drift.boundary is None else drift.boundary


@pytest.mark.crossed(3)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CONFIGS)
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, boundaries: list[Drift], name: str, spec: str
) -> None:
    seen = set[int]()
    for window in (2, 5, 13):
        llm = make(name, f"block=sliding:{window},commit=threshold:0.3,cache={spec}", max_batch=1)
        for prompt in PROMPTS[:3]:
            plain = denoise(source(name)[1], prompt, 13, window=window, least=0.3, **SPECS[spec])
            boundaries.clear()
            with decided(monkeypatch) as found:
                (result,) = llm.generate([prompt], WHOLE)
            assert found == [each for forward in plain.forwards for each in forward]
            assert [boundary(each) for each in boundaries] == plain.boundaries
            assert result.stats.computed == plain.computed
            assert list(result.token_ids) == plain.tokens[len(prompt) :]
            seen |= {boundary(each) for each in boundaries}
    if "-1.01" in spec:
        assert seen == {0, 3}
    elif spec != "elastic":
        assert seen & {1, 2}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_refresh_in_every_forward_is_no_cache(name: str) -> None:
    hot = SamplingParams(max_tokens=13, temperature=0.8, seed=4, ignore_eos=True)
    for params in (WHOLE, hot):
        plain = tokens(name, SLIDING, params)
        assert tokens(name, f"{SLIDING},cache=elastic:every=1", params) == plain


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_layers_and_others_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, boundaries: list[Drift], name: str
) -> None:
    computed, step, checked = [], Block.step, 0

    def counted(self: Block, x: Tensor, *rest: Any) -> Tensor:
        computed.append(len(x))
        return step(self, x, *rest)

    before, after = Drift.before, Drift.after
    entries: dict[int, Tensor] = {}

    def keys(layer: int) -> Tensor:
        (cache,) = llm.engine.loop.target.state.parts
        return cache.keys[layer, 0].clone()

    def noted(self: Drift, layer: int, x: Tensor, look: Look) -> Tensor | None:
        entries[layer] = keys(layer)
        return before(self, layer, x, look)

    def compared(self: Drift, layer: int, look: Look) -> None:
        nonlocal checked
        others = sorted({*range(self.size)} - {*self.rows})
        assert torch.equal(entries[layer][:, others], keys(layer)[:, others])
        # all entries, old and new, are those of the inputs that are kept
        model = llm.engine.loop.target.model
        block, rope = model.layers[layer], model.ropes(torch.arange(self.size), torch.float64)
        heads = block.mixer.split_heads(block.mixer_norm(self.kept.inputs[layer]))
        _, made, _ = block.mixer.to_features(*heads, rope[layer])
        torch.testing.assert_close(keys(layer)[:, : self.size], made.transpose(0, 1))
        checked += len(others)
        after(self, layer, look)

    monkeypatch.setattr(Block, "step", counted)
    monkeypatch.setattr(Drift, "before", noted)
    monkeypatch.setattr(Drift, "after", compared)
    llm: Any = make(name, f"{SLIDING},cache=elastic:0.97", max_batch=1)
    for prompt in PROMPTS:
        computed.clear()
        (result,) = llm.generate([prompt], WHOLE)
        assert result.stats.computed == sum(computed) <= 3 * 13 * (len(prompt) + 13)
    assert checked > 0
    assert len({boundary(each) for each in boundaries}) > 2


@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(name: str) -> None:
    asked = [
        SamplingParams(max_tokens=count, temperature=heat, seed=count, ignore_eos=True)
        for count, heat in ((13, 0.0), (6, 0.9), (20, 1.3), (1, 0.0))
    ]
    for spec in (f"{SLIDING},masks=8", "block=fixed:4,commit=static"):
        loop = f"{spec},cache=elastic:0.97"
        alone = make(name, loop, max_batch=1).generate(PROMPTS, asked)
        together = make(name, loop, max_batch=4).generate(PROMPTS, asked)
        for one, other in zip(alone, together, strict=True):
            assert one.token_ids == other.token_ids and MASK not in one.token_ids
            assert one.stats.computed == other.stats.computed
        assert [len(each.token_ids) for each in alone] == [13, 6, 20, 1]


def test_more_similarity_asked_computes_no_less() -> None:
    prompts = [[3 + seed, 3 + seed % 7, 5 + seed % 11] for seed in range(6)]
    counts = []
    for gamma in (-1.01, 0.9, 0.97, 1):
        found = make(spec=f"{SLIDING},cache=elastic:{gamma}").generate(prompts, WHOLE)
        counts.append(sum(e.stats.computed for e in found) / sum(e.stats.rounds for e in found))
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_a_window_that_holds_all_is_one_block() -> None:
    for name in CONFIGS:
        for commit in ("threshold:0.3", "static", "static:order=random"):
            params = SamplingParams(max_tokens=13, seed=2, ignore_eos=True)
            one = tokens(name, f"block=fixed:none,commit={commit}", params)
            assert tokens(name, f"block=sliding:13,commit={commit}", params) == one


def test_a_window_slides_over_the_first_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    with decided(monkeypatch) as found:
        make(spec="block=sliding:3,commit=static", max_batch=1).generate([PROMPTS[0]], WHOLE)
    left = list(range(3, 16))
    for position, _ in found:
        assert position in left[:3]
        left.remove(position)
    assert not left


def test_text_goes_out_as_far_as_it_is_decided_and_ends_there() -> None:
    llm = make(spec="block=sliding:3,commit=static")
    pieces = list(llm.stream([PROMPTS[0]], WHOLE))
    assert len(pieces) > 4
    (whole,) = llm.generate([PROMPTS[0]], WHOLE)
    assert tuple(t for piece in pieces for t in piece.token_ids) == whole.token_ids
    end = whole.token_ids[5]
    params = SamplingParams(max_tokens=13, stop_token_ids=(end,), ignore_eos=True)
    (found,) = llm.generate([PROMPTS[0]], params)
    assert found.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert found.finish_reason == "stop" and found.stats.rounds < 13
    assert not llm.engine.loop.running  # type: ignore[attr-defined]
    allowed = SamplingParams(max_tokens=13, allowed_token_ids=(3, EOS), min_tokens=9)
    for each in llm.generate(PROMPTS, allowed):
        assert EOS not in each.token_ids[:9]


@pytest.mark.parametrize("cache", ["prefix", "dual", "dkv", "dkv:across=true"])
def test_other_caches_go_with_a_window(cache: str) -> None:
    for name in CONFIGS:
        found, _ = tokens(name, f"{SLIDING},cache={cache}")
        assert all(len(each) == 13 and MASK not in each for each in found)


@pytest.mark.parametrize("kv", ["int8", "bfloat16"])
def test_attention_can_be_looked_at_in_caches_of_fewer_bits(kv: str) -> None:
    llm = LLM(
        load_diffusion(source("dream")[0]),
        tokenizer=tiny_tokenizer(),
        kv_cache_dtype=kv,
        loop=f"masked-diffusion:{SLIDING},cache=elastic",
    )
    for each in llm.generate(PROMPTS, WHOLE):
        assert len(each.token_ids) == 13 and MASK not in each.token_ids


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cache=elastic:1.5", "gamma must be a number of at most 1, got 1.5; every=1 computes"),
        ("cache=elastic:nan", "gamma must be"),
        ("cache=elastic:tracked=0", "tracked must be 1 or more"),
        ("cache=elastic:over=rows", "over must be one of keys, heads"),
        ("cache=elastic:masks=none", "masks must be one of open, all"),
        ("cache=elastic:every=0", "every must be 1 or more"),
        ("block=sliding:0", "window must be 1 or more"),
    ],
)
def test_what_a_spec_may_not_say_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(spec=spec)
