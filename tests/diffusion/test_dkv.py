"""dKV-Cache: a plain loop row for row, exact when everything is computed, and counts in closed form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import PROMPTS, WHOLE, decided, make, source, tokens
from helpers import randomise
from plain_denoising import Rows, denoise, dkv, greedy
from plain_diffusion import CONFIGS, MASK

from linspec import LLM, SamplingParams
from linspec.diffusion import Canvas
from linspec.diffusion.commits.static import Static
from linspec.diffusion.dkv import Delayed
from linspec.errors import ConfigError
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion

# what a spec is to the plain loop, and to the rule of the plain loop that goes with it
CACHES: dict[str, Rows] = {
    "dkv": dkv(),
    "dkv:3": dkv(3),
    "dkv:every=4+delay=0": dkv(4, 0),
    "dkv:every=4+delay=2": dkv(4, 2),
    "dkv:every=3+shift=right": dkv(3, kind="right"),
    "dkv:every=3+shift=un_right": dkv(3, kind="un_right"),
    "dkv:every=4+prompt=frozen": dkv(4, frozen=True),
    "dkv:every=1+prompt=frozen": dkv(1, frozen=True),
    "dkv:every=4+across=true": dkv(4, across=True),
}
GREEDY: dict[str, Rows] = {
    "dkv-greedy": greedy(),
    "dkv-greedy:every=4+window=3": greedy(4, 3),
    "dkv-greedy:every=4+prompt=frozen": greedy(4, frozen=True),
    "dkv-greedy:every=5+window=0": greedy(5, 0),
}


def assert_as_plain(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: str, block: int, rule: Any, rows: Rows
) -> None:
    """Decisions in their order, forwards and positions × layers."""
    llm = make(name, f"block=fixed:{block},{spec}", max_batch=1)
    for prompt in PROMPTS[:3]:
        plain = denoise(source(name)[1], prompt, 13, block=block, cache=rows, **rule)
        with decided(monkeypatch) as found:
            (result,) = llm.generate([prompt], WHOLE)
        assert found == [each for forward in plain.forwards for each in forward]
        assert result.stats.rounds == len(plain.forwards)
        assert result.stats.computed == plain.computed


@pytest.mark.crossed(4)
@pytest.mark.parametrize("spec", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: str
) -> None:
    for block in (5, 32):
        for commit, rule in (
            ("static", {"rule": "static"}),
            ("threshold:0.3", {"rule": "threshold", "number": 0.3}),
        ):
            asked = f"commit={commit},cache={spec}"
            assert_as_plain(monkeypatch, name, asked, block, rule, CACHES[spec])


@pytest.mark.crossed(2)
@pytest.mark.parametrize("spec", GREEDY)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: str
) -> None:
    for block, steps in ((5, 0), (32, 0), (32, 6)):
        asked = f"commit=static:order=left{f'+steps={steps}' if steps else ''},cache={spec}"
        rule = {"rule": "left", "number": steps}
        assert_as_plain(monkeypatch, name, asked, block, rule, GREEDY[spec])


@pytest.mark.crossed(2)
@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "random", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_refresh_in_every_forward_is_no_cache(name: str, order: str) -> None:
    hot = SamplingParams(max_tokens=13, temperature=0.8, seed=4, ignore_eos=True)
    commit = f"block=fixed:5,commit=static:order={order}"
    for params in (replace(WHOLE, seed=1), hot):
        plain = tokens(name, commit, params)
        assert tokens(name, f"{commit},cache=dkv:1", params) == plain
        if order in ("random", "left"):
            assert tokens(name, f"{commit},cache=dkv-greedy:1", params) == plain


@cache
def small(layers: int = 1) -> MaskedDiffusion:
    """With room for longer texts."""
    config = DiffusionConfig(
        vocab_size=40,
        mask_id=39,
        width=16,
        layers=layers,
        heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=16,
        max_positions=256,
    )
    return randomise(MaskedDiffusion(config), 0).double().eval()


def computed(spec: str, prompt: int, count: int) -> float:
    """Positions × layers beside those without a cache."""
    loop = f"masked-diffusion:block=fixed:none,commit=static:order=left,cache={spec}"
    llm = LLM(small(), tokenizer=tiny_tokenizer(), loop=loop)
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    (found,) = llm.generate([[3] * prompt], params)
    assert found.stats.rounds == count
    return found.stats.computed / (count * (prompt + count))


@pytest.mark.parametrize(("every", "ratio"), [(8, 0.358), (4, 0.451)])
def test_counts_have_a_closed_form(every: int, ratio: float) -> None:
    prompt = count = 64
    whole = [step <= 1 or step % every == 0 for step in range(count)]
    rows = [
        prompt + count if all_of else count - step + 1
        for step, all_of in zip(range(count), whole, strict=True)
    ]
    found = computed(f"dkv:{every}", prompt, count)
    assert found == sum(rows) / (count * (prompt + count))
    assert round(found, 3) == ratio
    refreshed = -(-count // 4) * (prompt + count)
    few = computed("dkv-greedy:every=4+window=4", prompt, count) * count * (prompt + count)
    assert few - refreshed <= 6 * (count - count // 4)
    assert round(few / (count * (prompt + count)), 2) == 0.28


def test_a_cached_forward_computes_masks_and_what_was_decided_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, plain = [], Delayed.rows

    def rows(self: Delayed, canvas: Canvas) -> Sequence[int]:
        found = plain(self, canvas)
        if canvas.step > 1 and canvas.step % 8:
            assert set(found) == canvas.undecided | set(canvas.fresh)
            seen.append(len(canvas.fresh))
        return found

    monkeypatch.setattr(Delayed, "rows", rows)
    tokens("llada", "block=fixed:none,commit=threshold:0.2,cache=dkv")
    assert max(seen) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_refresh_gives_the_logits_of_no_cache(name: str) -> None:
    llm = make(name, "block=fixed:none,commit=static,cache=dkv:4", max_batch=1)
    loop: Any = llm.engine.loop
    step, wholes, stale = loop._step, 0, 0

    def checked(forwards: Sequence[Any]) -> list[list[torch.Tensor]]:
        nonlocal wholes, stale
        found = step(forwards)
        (forward,) = forwards
        (reading,), ((logits,),) = forward.readings, found
        fresh = source(name)[1].logits(forward.of.canvas.tokens)[reading.read]
        error = float((logits - fresh).abs().max())
        if forward.of.canvas.step in (0, 1, 4, 8, 12):
            assert error < 1e-5
            wholes += 1
        stale += error > 1e-5
        return found

    loop._step = checked
    llm.generate([PROMPTS[0]], WHOLE)
    assert wholes == 5 and stale > 0


def likeness(name: str, spec: str) -> tuple[float, float]:
    """Of a few outputs, what fresh forwards over the same texts have and this one has too.

    The cosine of the keys of words that are kept, and the share of masks whose likeliest token is the same.
    """
    llm = make(name, f"block=fixed:none,commit=static,cache={spec}", max_batch=1)
    loop: Any = llm.engine.loop
    step, alike, same = loop._step, list[torch.Tensor](), list[bool]()

    def looked(forwards: Sequence[Any]) -> list[list[torch.Tensor]]:
        (forward,), ((logits,),) = forwards, step(forwards)
        (reading,) = forward.readings
        canvas, shift = forward.of.canvas, forward.of.canvas.logit_shift
        kept = sorted({*range(canvas.prompt_length, len(canvas))} - {*reading.rows})
        fresh: dict[int, Any] = {}
        expected = source(name)[1].rows_of(canvas.tokens, list(range(len(canvas))), fresh)
        (cache,) = loop.target.state.parts
        for layer, (keys, _) in fresh.items():
            held = cache.keys[layer, 0][:, kept]
            alike.append(torch.cosine_similarity(held, keys[0][:, kept], dim=-1).flatten())
        for row in (p - shift for p in canvas.open):
            mine = logits[reading.read.index(row)]
            same.append(bool(mine.argmax() == expected[row].argmax()))
        return [[logits]]

    loop._step = looked
    llm.generate([[3 + seed, 9] for seed in range(6)], WHOLE)
    return float(torch.cat(alike).mean()), sum(same) / len(same)


@pytest.mark.parametrize(("name", "shift"), [("llada", "un"), ("dream", "right")])
def test_what_is_kept_without_delay_is_that_of_the_mask(name: str, shift: str) -> None:
    early, late = (likeness(name, f"dkv:delay={delay}+shift={shift}") for delay in (0, 1))
    assert early[0] + 0.2 < late[0] and early[1] + 0.05 < late[1]


@pytest.mark.parametrize("spec", ["dkv:4", "dkv:every=4+prompt=frozen", "dkv-greedy:3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(name: str, spec: str) -> None:
    asked = [
        SamplingParams(max_tokens=count, temperature=heat, seed=count, ignore_eos=True)
        for count, heat in ((13, 0.0), (6, 0.9), (20, 1.3), (1, 0.0))
    ]
    loop = f"block=fixed:7,commit=static:order=random,masks=8,cache={spec}"
    alone = make(name, loop, max_batch=1).generate(PROMPTS, asked)
    together = make(name, loop, max_batch=4).generate(PROMPTS, asked)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids and MASK not in one.token_ids
        assert one.stats.computed == other.stats.computed
    assert [len(each.token_ids) for each in alone] == [13, 6, 20, 1]


def test_a_random_order_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, plain = [], Static.ahead

    def spied(self: Static, canvas: Canvas) -> Sequence[int]:
        found = plain(self, canvas)
        ahead.extend(found)
        return found

    monkeypatch.setattr(Static, "ahead", spied)
    spec = "block=fixed:5,commit=static:order=random,cache=dkv-greedy:9"
    with decided(monkeypatch) as found:
        make("llada", spec, max_batch=1).generate([PROMPTS[0]], WHOLE)
    order = [position for position, _ in found]
    assert sorted(order) == list(range(3, 16)) and order != sorted(order)
    # the first forward of a block draws the order of the block
    assert ahead == [*order[1:5], *order[6:10], *order[11:13]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cache=dkv-greedy", "which commit policy 'threshold' does not know before; use commit=st"),
        ("commit=static,cache=dkv-greedy", "commit policy 'static' does not know before"),
        ("cache=dkv:0", "every must be 1 or more"),
        ("cache=dkv:delay=-1", "delay must be 0 or more"),
        ("cache=dkv:prompt=kept", "prompt must be one of refreshed, frozen"),
        ("cache=dkv:shift=left", "shift must be one of un, un_right, right"),
        ("commit=static:order=left,cache=dkv-greedy:window=-1", "window must be 0 or more"),
    ],
)
def test_what_a_spec_may_not_say_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(spec=spec)


def test_a_commit_policy_that_looks_beyond_the_block_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Static, "ahead", lambda self, canvas: [0])
    llm = make(spec="commit=static:order=left,cache=dkv-greedy")
    (failed,) = llm.generate([PROMPTS[0]], WHOLE, return_errors=True)
    assert re.search(r"commit policy 'static' will decide \[0\] next", str(failed.error))
