"""The denoising loop: token for token a plain loop, alone and in company, with every cache and commit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import model_dir, tiny_tokenizer
from denoisers import PROMPTS, WHOLE, assert_traced, decided, make, source, tokens
from plain_denoising import Trace, denoise
from plain_diffusion import CONFIGS, EOS, MASK, VOCAB

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion
from linspec.errors import ConfigError, ContextOverflow, InputError

# what the spec of a commit policy is to the plain loop
COMMITS: dict[str, tuple[str, float]] = {
    "static": ("static", 0),
    "static:steps=3": ("static", 3),
    "threshold:0.3": ("threshold", 0.3),
    "factor:1.5": ("factor", 1.5),
    "entropy:2.0": ("entropy", 2.0),
}
CACHES = ("none", "prefix", "dual")


@pytest.mark.crossed(7)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_traces_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, commit: str, cache: str
) -> None:
    plain = source(name)[1]
    rule, number = COMMITS[commit]
    for block in (1, 5, 32):

        def expected(prompt: list[int], block: int = block) -> Trace:
            return denoise(plain, prompt, 13, block=block, rule=rule, number=number, cache=cache)

        assert_traced(
            monkeypatch, name, f"block=fixed:{block},commit={commit},cache={cache}", expected
        )


@pytest.mark.crossed(3)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_longer_output_goes_on_behind_what_is_decided(name: str, cache: str) -> None:
    llm = make(name, f"block=fixed:3,commit=threshold:0.3,cache={cache},masks=8", max_batch=2)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for prompt, found in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        text, forwards = prompt, 0
        for count in (8, 8, 4):
            trace = denoise(
                source(name)[1], text, count, block=3, rule="threshold", number=0.3, cache=cache
            )
            text, forwards = trace.tokens, forwards + len(trace.forwards)
        assert [*prompt, *found.token_ids] == text
        assert found.stats.rounds == forwards and found.finish_reason == "length"


@pytest.mark.crossed(3)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(name: str, cache: str) -> None:
    spec = f"block=fixed:4,commit=threshold:0.3,cache={cache}"
    asked = [
        SamplingParams(max_tokens=count, temperature=heat, seed=count, ignore_eos=True)
        for count, heat in ((13, 0.0), (6, 0.9), (20, 1.3), (1, 0.0))
    ]
    alone = make(name, spec, max_batch=1).generate(PROMPTS, asked)
    for batch in (2, 4):
        together = make(name, spec, max_batch=batch).generate(PROMPTS, asked)
        assert [e.token_ids for e in together] == [e.token_ids for e in alone]
        assert [e.stats.rounds for e in together] == [e.stats.rounds for e in alone]
    assert [len(each.token_ids) for each in alone] == [13, 6, 20, 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_a_forward_is_what_all_policies_agree_on(name: str) -> None:
    static, forwards = tokens(name, "block=fixed:5,commit=static")
    assert forwards == [13] * len(PROMPTS)
    for commit in (
        "threshold:1.0",
        "threshold:least=1.0+by=margin",
        "factor:1e-9",
        "local-leap:sure=1.0+near=1.0",
        "static:steps=13",
    ):
        found, counts = tokens(name, f"block=fixed:5,commit={commit}")
        # margin judges otherwise which token comes first; the count is the same
        assert counts == forwards
        assert found == static or "margin" in commit


@pytest.mark.parametrize("name", CONFIGS)
def test_no_threshold_is_a_forward_a_block(name: str) -> None:
    one, counts = tokens(name, "block=fixed:5,commit=threshold:1e-12")
    assert counts == [3] * len(PROMPTS)
    for commit in ("static:steps=1", "factor:100", "entropy:9"):
        assert tokens(name, f"block=fixed:5,commit={commit}") == (one, counts)


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_that_is_refreshed_in_every_forward_is_none(name: str, cache: str) -> None:
    for params in (WHOLE, SamplingParams(max_tokens=13, temperature=0.8, seed=4, ignore_eos=True)):
        plain = tokens(name, "block=fixed:5,commit=threshold:0.3,cache=none", params)
        fresh = f"block=fixed:5,commit=threshold:0.3,cache={cache}:every=1"
        assert tokens(name, fresh, params) == plain
    # a block whose first forward fills it never reads anything old
    one = "block=fixed:5,commit=static:steps=1,cache="
    assert tokens(name, one + cache) == tokens(name, one + "none")


def test_caches_compute_less_and_the_dual_one_least() -> None:
    def computed(cache: str) -> int:
        llm = make("llada", f"block=fixed:4,commit=static,cache={cache}")
        return sum(each.stats.computed for each in llm.generate(PROMPTS, WHOLE))

    none, prefix, dual = (computed(cache) for cache in CACHES)
    assert dual < prefix < none
    assert dual <= 0.5 * none


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "random", "left"])
def test_every_order_decides_all_masks_once(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    llm = make("dream", f"block=fixed:none,commit=static:order={order}", max_batch=1)
    with decided(monkeypatch) as found:
        llm.generate([PROMPTS[0]], WHOLE)
    places = [position for position, _ in found]
    assert sorted(places) == list(range(3, 16))
    assert (places == sorted(places)) == (order == "left")


def test_what_is_drawn_has_the_distribution_of_the_model() -> None:
    plain, prompt, heat = source("llada")[1], PROMPTS[0], 0.7
    logits = plain.predicted([*prompt, MASK])[-1]
    logits[MASK] = -torch.inf
    expected = (logits / heat).softmax(-1)
    params = SamplingParams(max_tokens=1, n=1000, temperature=heat, seed=1, ignore_eos=True)
    (found,) = make(max_batch=64).generate([prompt], params)
    drawn = torch.tensor([each.token_ids[0] for each in found.outputs])
    counts = torch.bincount(drawn, minlength=VOCAB) / 1000
    assert float((counts - expected).abs().sum()) / 2 < 0.12
    (again,) = make(max_batch=3).generate([prompt], params)
    assert [e.token_ids for e in again.outputs] == [e.token_ids for e in found.outputs]


def test_blocks_go_out_when_they_are_full() -> None:
    llm = make(spec="block=fixed:5,commit=threshold:0.3")
    pieces = list(llm.stream([PROMPTS[0]], WHOLE))
    assert [len(piece.token_ids) for piece in pieces] == [5, 5, 3]
    assert pieces[-1].done is not None and pieces[-1].done.finish_reason == "length"
    (whole,) = llm.generate([PROMPTS[0]], WHOLE)
    assert tuple(t for piece in pieces for t in piece.token_ids) == whole.token_ids


def test_an_end_cuts_the_text_and_later_blocks_are_not_computed() -> None:
    (free,) = make(spec="block=fixed:4,commit=static").generate([PROMPTS[0]], WHOLE)
    end = free.token_ids[5]
    first = free.token_ids.index(end)
    for params in (
        SamplingParams(max_tokens=13, stop_token_ids=(end,), ignore_eos=True),
        SamplingParams(max_tokens=13, stop_token_ids=(end,), min_tokens=1),
    ):
        results = {}
        for stop in ("never", "end-of-text"):
            spec = f"block=fixed:4,commit=static,stop={stop}"
            pieces = list(make(spec=spec).stream([PROMPTS[0]], params))
            results[stop] = pieces[-1].done
        never, early = results["never"], results["end-of-text"]
        assert never is not None and early is not None
        assert never.token_ids == early.token_ids == free.token_ids[: first + 1]
        assert never.text == early.text and never.finish_reason == early.finish_reason == "stop"
        assert (never.stats.rounds, early.stats.rounds) == (13, 4 * (first // 4 + 1))


def test_settings_of_a_request_hold_in_any_order() -> None:
    llm = make(spec="block=fixed:5,commit=threshold:0.2")
    allowed = SamplingParams(max_tokens=13, allowed_token_ids=(3, 4, EOS), min_tokens=9)
    for each in llm.generate(PROMPTS, allowed):
        assert set(each.token_ids) <= {3, 4, EOS} and EOS not in each.token_ids[:9]
    (one,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6, logit_bias={8: 1000.0}))
    assert one.token_ids == (8,) * 6
    (narrow,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6, temperature=2, top_k=1))
    (greedy,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6))
    assert narrow.token_ids == greedy.token_ids


def test_a_stop_string_ends_the_text_with_its_block() -> None:
    llm = make(spec="block=fixed:5,commit=threshold:0.3", max_batch=1)
    (whole,) = llm.generate([PROMPTS[0]], WHOLE)
    stop = whole.text[6:8]
    params = SamplingParams(max_tokens=13, ignore_eos=True, stop=stop)
    (found,) = llm.generate([PROMPTS[0]], params)
    assert found.finish_reason == "stop"
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.stats.rounds < whole.stats.rounds
    assert not llm.engine.busy and not llm.engine.loop.running  # type: ignore[attr-defined]


def test_the_output_ends_where_the_positions_do() -> None:
    (found,) = make().generate([[4] * 90], SamplingParams(max_tokens=50, ignore_eos=True))
    assert (len(found.token_ids), found.finish_reason) == (6, "length")
    with pytest.raises(ContextOverflow, match="leaves no position for a mask"):
        make().generate([[4] * 96], WHOLE)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("commit=threshold:0", "least must be above 0 and at most 1, got 0"),
        ("commit=threshold:1.5", "least must be above 0 and at most 1, got 1.5"),
        ("commit=local-leap:sure=0.5", "near must be at most sure, got 0.75 and 0.5"),
        ("commit=local-leap:radius=-1", "radius must be 0 or more"),
        ("commit=static:steps=0", "steps must be 1 or more"),
        ("commit=static:order=best", "order must be one of confidence, margin"),
        ("commit=treshold", "did you mean 'threshold'"),
        ("block=fixed:0", "length must be 1 or more"),
        ("cache=dual:every=0", "every must be 1 or more"),
        ("stop=prophet:over=most", "over must be one of mean, least"),
        ("masks=0", "masks must be 1 or more"),
        ("steps=4", "has no option 'steps'; known: block, commit, stop, cache, verify, masks"),
    ],
)
def test_what_a_spec_may_not_say_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(spec=spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"repetition_penalty": 1.2, "logprobs": 1},
            "repetition_penalty, logprobs go by the tokens",
        ),
        ({"bad_words": ((4,),)}, "bad_words go by"),
        ({"logits_processors": (lambda output, scores: scores,)}, "logits_processors go by"),
    ],
    # a function's text has its address, which differs by process
    ids=["penalty", "bad words", "processors"],
)
def test_what_goes_by_the_order_of_tokens_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make().generate([PROMPTS[0]], SamplingParams(**settings))
    with pytest.raises(InputError, match="holds the mask token 60"):
        make().generate([[4, MASK]], WHOLE)


def test_models_and_loops_that_do_not_fit_say_so() -> None:
    with pytest.raises(ConfigError, match="a Decoder has none. Use the loop 'auto'"):
        LLM(model_dir("softmax"), loop="masked-diffusion")
    with pytest.raises(ConfigError, match="takes no drafter"):
        make(drafter="prompt-lookup", policy=3)


@pytest.mark.parametrize("loop", ["autoregressive", "beam", "dsbd"])
def test_a_loop_for_tokens_in_order_met_the_masks_of_a_model_in_its_first_step(loop: str) -> None:
    with pytest.raises(ConfigError, match=f"loop '{loop}' writes one token behind .* loop 'auto'"):
        LLM(load_diffusion(source("llada")[0]), tokenizer=tiny_tokenizer(), loop=loop)


@pytest.mark.parametrize("kv", ["int8", "bfloat16"])
def test_caches_of_fewer_bits_hold_a_canvas_too(kv: str) -> None:
    llm = LLM(load_diffusion(source("dream")[0]), tokenizer=tiny_tokenizer(), kv_cache_dtype=kv)
    for each in llm.generate(PROMPTS, WHOLE):
        assert len(each.token_ids) == 13 and MASK not in each.token_ids
