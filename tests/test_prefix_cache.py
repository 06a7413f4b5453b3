"""A prefix cache changes how much of a prompt is read, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from block_drafters import make_net
from block_drafters import make_target as block_target
from drafters.test_eagle import Lucky, random_net
from guests import paged_state, soft_prompt
from helpers import MIXER_NAMES, assert_same_bytes, random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import DRAFTERS, SLOTS

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.drafters.base import Drafter
from linspec.drafters.block import Block
from linspec.engine.budget import PIECE
from linspec.engine.engine import Engine
from linspec.engine.prefix_cache import PrefixCache, PrefixOptions
from linspec.errors import ConfigError, WrongType
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer
from linspec.policies.fixed import Fixed
from linspec.state.pages import bytes_of
from linspec.verifiers import LosslessVerifier

LARGE = 10**9
GUESTS = (paged_state, soft_prompt)
KINDS = {
    **DRAFTERS,
    "eagle": lambda model: Lucky(random_net(model), slots=SLOTS),
}
SHORT = SamplingParams(max_tokens=6)


def engine_of(
    model: Decoder,
    drafter: Drafter | None = None,
    *,
    budget: int | None = LARGE,
    stride: int = PIECE,
    **settings: Any,
) -> Engine:
    options = None if budget is None else PrefixOptions(bytes=budget, stride=stride, least=2)
    return Engine(
        model,
        verifier=LosslessVerifier(),
        drafter=drafter,
        policy=Fixed(6),
        slots=SLOTS,
        prefix_cache=options,
        **settings,
    )


def cache_of(engine: Engine) -> PrefixCache:
    assert engine.prefix_cache is not None
    return engine.prefix_cache


def run(engine: Engine, *requests: Request) -> list[RunningSequence]:
    """The finished sequences of requests that run side by side."""
    handles, done = [engine.add(request) for request in requests], {}
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            if outcome.finished:
                done[outcome.sequence.request] = outcome.sequence
    return [done[handle] for handle in handles]


def ask(engine: Engine, prompt: Sequence[int], params: SamplingParams = SHORT) -> RunningSequence:
    (found,) = run(engine, Request(tuple(prompt), params))
    return found


def output(sequence: RunningSequence) -> list[int]:
    return sequence.tokens[sequence.prompt_length :]


@cache
def model_of(mixer: str) -> Decoder:
    return tiny_model(mixer)


def prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts that share beginnings of any length."""
    rng, found = random.Random(seed), [random_tokens(150, seed)]
    for _ in range(count - 1):
        before = rng.choice(found)
        kept = before[: rng.choice([len(before), rng.randint(0, len(before))])]
        found.append(kept + random_tokens(rng.randint(1, 90), rng.randrange(2**20)))
    return found


# ---- outputs


@pytest.mark.crossed(10)
@pytest.mark.parametrize("mixer", MIXER_NAMES)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**20), budget=st.sampled_from([LARGE, 20_000, 100]))
def test_tokens_are_those_without_a_cache(mixer: str, seed: int, budget: int) -> None:
    rng, model = random.Random(seed), model_of(mixer)
    plain, cached = engine_of(model, budget=None), engine_of(model, budget=budget)
    asked = prompts(seed, 6)
    expected = [output(ask(plain, prompt)) for prompt in asked]
    left = list(range(len(asked)))
    while left:
        now, left = (batch := left[: rng.randint(1, 3)]), left[len(batch) :]
        found = run(cached, *(Request(tuple(asked[i]), SHORT) for i in now))
        assert [output(each) for each in found] == [expected[i] for i in now]
        check_books(cache_of(cached))


def check_books(kept: PrefixCache) -> None:
    """The bytes are those of the nodes, within the budget, and all that can leave is known."""
    nodes, left = [], list(kept._roots.values())
    while left:
        node = left.pop()
        left += node.children.values()
        nodes += [] if node.parent is None else [node]
        for token, child in node.children.items():
            assert child.tokens[0] == token and child.parent is node
            assert child.end == node.end + len(child.tokens)
    pages = [page for node in nodes for each in node.pages for page in each]
    # two edges may meet in a page, which counts once
    assert kept.bytes == sum(node.bytes for node in nodes) + bytes_of(pages)
    assert kept.bytes <= kept.options.bytes
    assert set(kept._leaving) == {n for n in nodes if n.rest is not None or not n.children}


@pytest.mark.crossed(6)
@pytest.mark.parametrize("mixer", ["softmax", "aug", "by-head", "window", "gdn"])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**20))
def test_requests_that_are_dropped_leave_a_sound_cache(mixer: str, seed: int) -> None:
    rng, model = random.Random(seed), model_of(mixer)
    plain = engine_of(model, budget=None)
    cached = engine_of(model, budget=50_000, prefill_tokens=rng.choice([7, 64, 100, 512]))
    for prompt in prompts(seed, 5):
        handle = cached.add(Request(tuple(prompt), SamplingParams(max_tokens=20)))
        for _ in range(rng.randint(0, 6)):
            cached.step()
        cached.abort(handle)
        check_books(cache_of(cached))
        assert output(ask(cached, prompt)) == output(ask(plain, prompt))


@pytest.mark.crossed(8)
@pytest.mark.parametrize("drafter", [None, "lookup", "eagle"])
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@settings(max_examples=4)
@given(seed=st.integers(0, 2**20))
def test_sequences_that_leave_their_slots_keep_sound_states(
    mixer: str, drafter: str | None, seed: int
) -> None:
    rng, model, asked = random.Random(seed), model_of(mixer), prompts(seed, 6)
    plain = engine_of(model, budget=None)
    longest = plain.state.bytes_at(2 * max(map(len, asked)))
    made = KINDS[drafter](model) if drafter else None
    cached = engine_of(model, made, state_bytes=longest, prefill_tokens=rng.choice([64, 100]))
    params = SamplingParams(max_tokens=20)
    for _ in range(2):
        waiting, done = list(range(len(asked))), {}
        handles = {}
        while waiting or cached.busy:
            if waiting and rng.random() < 0.6:
                which = waiting.pop()
                request = Request(tuple(asked[which]), params, priority=rng.randint(0, 2))
                handles[cached.add(request)] = which
            for outcome in cached.step():
                assert outcome.error is None
                if outcome.finished:
                    done[handles[outcome.sequence.request]] = output(outcome.sequence)
        assert [done[i] for i in range(6)] == [output(ask(plain, each, params)) for each in asked]
        check_books(cache_of(cached))


@pytest.mark.crossed(5)
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("name", KINDS)
def test_drafters_draft_behind_a_cached_prompt(name: str, mixer: str) -> None:
    model = tiny_model(mixer)
    if name != "medusa":
        model.to_inference()
    shared = random_tokens(2 * PIECE, seed=3) + random_tokens(20, seed=4) * 2
    asked = [shared + random_tokens(n, seed=n) for n in (5, 9, 9 + PIECE)]
    params = SamplingParams(max_tokens=25)
    plain = engine_of(model, budget=None)
    expected = [output(ask(plain, prompt, params)) for prompt in asked]
    without = engine_of(model)
    lengths = [ask(without, prompt, params).cached_tokens for prompt in asked]
    engine = engine_of(model, KINDS[name](model))
    found = [ask(engine, prompt, params) for prompt in asked]
    assert [output(each) for each in found] == expected
    # as much is found as without drafts
    assert [each.cached_tokens for each in found] == lengths
    assert lengths[0] == 0 and min(lengths[1:]) >= PIECE
    drafted = [each.stats.drafted > 0 for each in found]
    assert drafted == [drafted[0]] * 3


def test_block_drafters_draft_behind_a_cached_prompt() -> None:
    model = block_target()
    net = make_net(model)
    model.to_inference()
    shared, params = random_tokens(3 * PIECE, seed=1), SamplingParams(max_tokens=25)
    plain, engine = engine_of(model, budget=None), engine_of(model, Block(net))
    for n in (5, 9, 14):
        prompt = shared + random_tokens(n, seed=n)
        found = ask(engine, prompt, params)
        assert output(found) == output(ask(plain, prompt, params))
        assert found.stats.drafted > 0
        assert bool(found.cached_tokens) == (n != 5)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("kind", ["int8", "int4", "float16", "bfloat16", "guest-paged:4"])
@pytest.mark.parametrize(
    "mixers", [("softmax", "softmax"), ("softmax", "aug"), ("by-head",)], ids=str
)
def test_caches_of_every_kind(kind: str, mixers: tuple[str, ...]) -> None:
    model = tiny_model(*mixers)
    engines = [engine_of(model, budget=b, kv_cache_dtype=kind) for b in (None, LARGE)]
    for prompt in prompts(5, 6):
        plain, cached = (output(ask(engine, prompt)) for engine in engines)
        assert cached == plain
    assert cache_of(engines[1]).counters.hits >= 2


@pytest.mark.crossed(3)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_bits_are_those_of_the_same_pieces(mixer: str, bits: int | None) -> None:
    """A prompt that begins at a border has the state of one that was read in pieces up to there."""
    model = tiny_model(mixer, dtype=torch.float32)
    model.to_inference(Quantizer(bits, {})) if bits else model.to_inference()
    shared = random_tokens(2 * PIECE, seed=1)
    first, second = (shared + random_tokens(40, seed=n) for n in (2, 3))
    warm, cold = (engine_of(model, budget=b, prefill_tokens=PIECE) for b in (LARGE, None))
    ask(warm, first)
    snapshots = []
    for engine in (warm, cold):
        engine.add(Request(tuple(second), SamplingParams(max_tokens=9)))
        while not (running := engine.scheduler.running) or running[0].prefilling:
            engine.step()
        snapshots.append(engine.state.snapshot(running[0].slot))
        assert running[0].cached_tokens == (2 * PIECE if engine is warm else 0)
    assert_same_bytes(*snapshots)


# ---- what is found


@pytest.mark.crossed(3)
@pytest.mark.parametrize("drafter", [None, "itself", "lookup", "random"])
@pytest.mark.parametrize("mixer", ["softmax", "aug", "gla", "window", "by-head"])
@pytest.mark.parametrize("end", ["length", "stop"])
def test_a_chat_that_only_grows_never_reads_its_prompt_again(
    mixer: str, drafter: str | None, end: str
) -> None:
    model = tiny_model(mixer)
    made = DRAFTERS[drafter](model) if drafter else None
    engine, plain = engine_of(model, made, stride=512), engine_of(model, budget=None)
    text, before = random_tokens(40, seed=1), 0
    for turn in range(4):
        params = SamplingParams(max_tokens=9 + turn)
        if end == "stop":
            free = output(ask(plain, text, replace(params, max_tokens=12)))
            params = SamplingParams(max_tokens=30, stop_token_ids=(free[5],))
        found = ask(engine, text, params)
        # all but the last token of the answer before, which was never read
        assert found.cached_tokens == max(0, before - 1)
        assert output(found) == output(ask(plain, text, params))
        before = len(found.tokens)
        text = found.tokens + random_tokens(11 + 5 * turn, seed=turn)


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_what_two_prompts_share_is_kept_for_the_third(mixer: str) -> None:
    engine = engine_of(tiny_model(mixer), stride=512)
    shared = random_tokens(PIECE + 30, seed=7)
    lengths = [ask(engine, shared + random_tokens(80, seed=n)).cached_tokens for n in range(3)]
    border = PIECE if mixer == "aug" else len(shared)
    assert lengths[1] in ((0,) if mixer == "aug" else (border, border + 1))
    assert lengths[2] in (border, border + 1)


def test_rows_of_a_cache_are_kept_once() -> None:
    model = tiny_model("softmax")
    engine = engine_of(model)
    shared = random_tokens(8 * PIECE, seed=2)
    for n in range(6):
        ask(engine, shared + random_tokens(PIECE, seed=n + 1))
    kept = cache_of(engine)
    tokens = 8 * PIECE + 6 * (PIECE + SHORT.max_tokens)
    assert kept.bytes <= tokens * (engine.state.bytes_at(1) + 8)


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_tenants_never_see_each_others_prompts(mixer: str) -> None:
    engine, prompt = engine_of(tiny_model(mixer)), tuple(random_tokens(3 * PIECE, seed=1))
    for tenant in ("", "a", "b"):
        first, second = (
            run(engine, Request(prompt, SHORT, tenant=tenant))[0].cached_tokens for _ in range(2)
        )
        assert first == 0 and second >= 2 * PIECE
    check_books(cache_of(engine))


def test_a_tenant_is_a_text() -> None:
    with pytest.raises(WrongType, match="tenant of a Request must be of type str"):
        engine_of(tiny_model("aug")).add(Request((1, 2), tenant=5))  # type: ignore[arg-type]


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_some_prompts_are_read_whatever_is_known(mixer: str) -> None:
    model = tiny_model(mixer)
    engine, prompt = engine_of(model), tuple(random_tokens(2 * PIECE + 1, seed=1))
    ask(engine, prompt)
    given_states = torch.randn(len(prompt), model.config.width, dtype=torch.float64)
    scored = SamplingParams(max_tokens=3, prompt_logprobs=1)
    for request in (Request(prompt, SHORT, embeddings=given_states), Request(prompt, scored)):
        for _ in range(2):
            assert run(engine, request)[0].cached_tokens == 0
    assert cache_of(engine).counters.queries == 1
    # and what was given instead of tokens is nobody's beginning
    assert output(ask(engine, prompt)) == output(ask(engine_of(model, budget=None), prompt))


def test_counters_say_what_was_asked_and_found() -> None:
    engine, prompt = engine_of(tiny_model("aug")), random_tokens(2 * PIECE + 5, seed=1)
    ask(engine, prompt)
    again = ask(engine, prompt)
    found = cache_of(engine).counters
    assert (found.queries, found.hits) == (2, 1)
    assert (found.queried_tokens, found.hit_tokens) == (2 * len(prompt), again.cached_tokens)
    assert again.cached_tokens == 2 * PIECE and found.evictions == 0


def test_the_longest_unused_leaves_first() -> None:
    model = tiny_model("aug")
    texts = [random_tokens(PIECE + 9, seed=n) for n in range(3)]
    one = engine_of(model)
    ask(one, texts[0])
    engine = engine_of(model, budget=int(2.5 * cache_of(one).bytes))
    for text in (texts[0], texts[1], texts[0], texts[2]):
        ask(engine, text)
    assert cache_of(engine).counters.evictions > 0
    kept = [text for text in texts if ask(engine, text).cached_tokens]
    assert texts[0] in kept and texts[1] not in kept


def test_an_interrupt_empties_the_cache() -> None:
    engine, prompt = engine_of(tiny_model("aug")), random_tokens(PIECE + 5, seed=1)
    ask(engine, prompt)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before, engine.rounds.next = engine.rounds.next, interrupted  # type: ignore[method-assign]
    engine.add(Request(tuple(prompt), SHORT))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.rounds.next = before  # type: ignore[method-assign]
    assert cache_of(engine).bytes == 0
    assert ask(engine, prompt).cached_tokens == 0


@pytest.mark.parametrize("method", ["rebuild", "rest"])
def test_a_state_that_cannot_be_used_costs_nothing_but_its_hit(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = tiny_model("aug"), random_tokens(PIECE + 5, seed=1)
    engine = engine_of(model)
    ask(engine, prompt)

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.state, method, broken)
    assert output(ask(engine, prompt)) == output(ask(engine_of(model, budget=None), prompt))


@pytest.mark.parametrize("stride", [0, PIECE - 1, 2.5])
def test_options_are_checked(stride: Any) -> None:
    with pytest.raises(ConfigError, match="stride of a prefix cache must be"):
        PrefixOptions(bytes=1, stride=stride)


def test_pieces_end_where_a_state_is_to_be_kept() -> None:
    sequence = RunningSequence(1, None, [1] * 200, 200, stops=(64, 128, 300))  # type: ignore[arg-type]
    ends: list[int] = []
    while sequence.unread:
        sequence.prefilled += sequence.unread
        ends.append(sequence.prefilled)
    assert ends == [64, 128, 200]
