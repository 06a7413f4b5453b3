"""A request of several sequences: its prompt is read once, held once, and answered as if each were alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from drafters.test_eagle import Lucky, random_net
from helpers import MIXER_NAMES, random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import DRAFTERS

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.engine.budget import PIECE
from linspec.engine.engine import Engine
from linspec.engine.prefix_cache import PrefixOptions
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer
from linspec.policies.fixed import Fixed
from linspec.state.pages import PAGE
from linspec.verifiers import LosslessVerifier

SLOTS, N = 4, 4
KINDS = ["float", "int8", "int4", "bfloat16", "float16"]
ALL_DRAFTERS = {**DRAFTERS, "eagle": lambda model: Lucky(random_net(model), slots=SLOTS)}


@cache
def fast(mixer: str) -> Decoder:
    """A model whose steps are one call."""
    made = tiny_model(mixer, dtype=torch.float32)
    made.to_inference(Quantizer(8, {}))
    return made


def engine_of(model: Decoder, drafter: Any = None, cached: bool = False, **changes: Any) -> Engine:
    kept = PrefixOptions(bytes=10**9, stride=PIECE, least=2) if cached else None
    given = {"slots": SLOTS, "policy": Fixed(6), "prefix_cache": kept} | changes
    return Engine(model, verifier=LosslessVerifier(), drafter=drafter, **given)


def params_of(
    n: int = N, tokens: int = 9, temperature: float = 1.0, **changes: Any
) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=temperature, seed=7, n=n, **changes)


def run(engine: Engine, *requests: Request) -> list[list[RunningSequence]]:
    """The finished sequences of requests that run side by side, in their order."""
    handles = [engine.add(request) for request in requests]
    done: dict[int, list[RunningSequence]] = {handle: [] for handle in handles}
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            if outcome.finished:
                done[outcome.sequence.request].append(outcome.sequence)
    return [sorted(done[handle], key=lambda each: each.index) for handle in handles]


def outputs(sequences: list[RunningSequence]) -> list[list[int]]:
    return [each.tokens[each.prompt_length :] for each in sequences]


def apart(
    model: Decoder, prompt: list[int], params: SamplingParams, **changes: Any
) -> list[list[int]]:
    """What requests of one sequence with the same seeds get, one after the other."""
    found = []
    for one in params.sequences():
        (sequences,) = run(engine_of(model, **changes), Request(tuple(prompt), one))
        found += outputs(sequences)
    return found


@contextmanager
def counted(engine: Engine) -> Iterator[list[int]]:
    """The prompt tokens that the engine reads."""
    read, loop = [], engine.loop
    before = loop.round

    def rounds(batch: Any) -> Any:
        read.append(sum(count for _, count in batch.prefilling))
        return before(batch)

    loop.round = rounds  # type: ignore[method-assign]
    yield read
    loop.round = before  # type: ignore[method-assign]


@pytest.mark.crossed(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_n_samples_of_a_prompt_read_it_once_and_hold_it_once(kind: str, cached: bool) -> None:
    model, prompt = fast("softmax"), random_tokens(40 * PAGE + 9, seed=3)
    params = params_of()
    engine = engine_of(model, cached=cached, kv_cache_dtype=kind, slots=N)
    with counted(engine) as read:
        (sequences,) = run(engine, Request(tuple(prompt), params))
    # each reads the last token, whose step gives the logits of the next one
    assert sum(read) == len(prompt) + N - 1
    assert outputs(sequences) == apart(model, prompt, params, kv_cache_dtype=kind)
    one, all_of_them = (
        _most_bytes(engine_of(model, kv_cache_dtype=kind), prompt, n) for n in (1, N)
    )
    assert all_of_them < one + N * engine.state.bytes_at(PAGE + params.max_tokens)


def _most_bytes(engine: Engine, prompt: list[int], n: int) -> int:
    """Most bytes of a request of n sequences: pages, and what buffers hold."""
    engine.add(Request(tuple(prompt), params_of(n)))
    most = 0
    while engine.busy:
        engine.step()
        running = [each.slot for each in engine.scheduler.running]
        own = sum(
            part.entry_bytes(part._own(slot)) for part in engine.state.parts for slot in running
        )
        pages = sum(part.pool.bytes for part in engine.state.parts)
        assert engine.state.bytes(*running) <= own + pages
        most = max(most, own + pages)
    return most


@pytest.mark.crossed(5)
@pytest.mark.parametrize("drafter", [*ALL_DRAFTERS, None])
@pytest.mark.parametrize("mixer", ["softmax", "aug", "window", "by-head"])
def test_drafts_and_mixers_change_no_token(mixer: str, drafter: str | None) -> None:
    model, prompt = tiny_model(mixer), random_tokens(3 * PIECE + 20, seed=4)
    made = None if drafter is None else ALL_DRAFTERS[drafter](model)
    engine, params = engine_of(model, made), params_of(temperature=1e-6)
    with counted(engine) as read:
        (sequences,) = run(engine, Request(tuple(prompt), params))
    rest = 1 if engine.state.only_grows else 20
    assert sum(read) == len(prompt) + (N - 1) * rest
    assert outputs(sequences) == apart(model, prompt, params)


@pytest.mark.crossed(5)
@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("cached", [False, True])
def test_every_mixer_draws_what_requests_of_their_own_draw(mixer: str, cached: bool) -> None:
    model, prompt = tiny_model(mixer), random_tokens(2 * PIECE + 5, seed=5)
    (sequences,) = run(engine_of(model, cached=cached), Request(tuple(prompt), params_of()))
    assert outputs(sequences) == apart(model, prompt, params_of())


@settings(max_examples=settings().max_examples * 3 // 2)
@given(seed=st.integers(0, 2**20), limit=st.sampled_from([None, 2, 3]), cached=st.booleans())
def test_any_mix_of_requests_in_little_memory_gets_the_tokens_of_each_alone(
    seed: int, limit: int | None, cached: bool
) -> None:
    model = fast("softmax")
    asked = [
        (random_tokens(20 + seed * (i + 3) % 200, seed + i), 1 + (seed >> i) % 4) for i in range(4)
    ]
    size = engine_of(model).state.bytes_at(250)
    engine = engine_of(
        model, cached=cached, state_bytes=limit and limit * size, prefill_tokens=PIECE
    )
    requests = [Request(tuple(prompt), params_of(n)) for prompt, n in asked]
    for sequences, (prompt, n) in zip(run(engine, *requests), asked, strict=True):
        assert outputs(sequences) == apart(model, prompt, params_of(n))
    for part in engine.state.parts:
        for slot in range(SLOTS):
            part.reset(slot)
        if engine.prefix_cache is not None:
            engine.prefix_cache.clear()
            _collect()
        assert not len(part.pool)


def _collect() -> None:
    import gc

    gc.collect()


def test_memory_of_one_prompt_and_its_answers_is_enough() -> None:
    """What sequences share counts once, so nobody is pre-empted for it."""
    model, prompt = fast("softmax"), random_tokens(20 * PAGE, seed=6)
    state = engine_of(model).state
    limit = state.bytes_at(20 * PAGE) + N * state.bytes_at(5 * PAGE)
    assert limit < 3 * state.bytes_at(20 * PAGE)
    engine = engine_of(model, state_bytes=limit, slots=N)
    most = 0
    engine.add(Request(tuple(prompt), params_of(tokens=20)))
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None and not outcome.sequence.preempted
        most = max(most, engine.running)
    assert most == N


def test_who_waits_for_a_prompt_lets_others_pass() -> None:
    engine = engine_of(fast("softmax"), prefill_tokens=PIECE, slots=2)
    long = engine.add(Request(tuple(random_tokens(6 * PIECE, 1)), params_of(3)))
    short = engine.add(Request(tuple(random_tokens(9, 2)), params_of(1, tokens=2)))
    ended = []
    while engine.busy:
        ended += [each.sequence.request for each in engine.step() if each.finished]
    assert ended == [short, long, long, long]


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_others_read_for_themselves_where_the_first_has_gone(mixer: str, after: int) -> None:
    """It may end at any moment: before its prompt is read, and behind it."""
    model, prompt = tiny_model(mixer), random_tokens(3 * PIECE - 4, seed=8)
    engine, params = engine_of(model, prefill_tokens=PIECE, slots=2), params_of(3)
    engine.add(Request(tuple(prompt), params))
    for _ in range(after):
        engine.step()
    (first,) = (each for each in engine.scheduler.running if each.index == 0)
    assert engine.retire(first) is None
    done = {}
    while engine.busy:
        done |= {each.sequence.index: each.sequence for each in engine.step() if each.finished}
    assert outputs([done[1], done[2]]) == apart(model, prompt, params)[1:]


def test_a_dropped_request_leaves_no_page() -> None:
    model = fast("softmax")
    for steps in range(6):
        engine = engine_of(model, prefill_tokens=PIECE, slots=2)
        handle = engine.add(Request(tuple(random_tokens(4 * PIECE, 1)), params_of(3)))
        for _ in range(steps):
            engine.step()
        engine.abort(handle)
        assert not engine.busy
        for slot in range(2):
            engine.state.reset(slot)
        assert not len(engine.state.parts[0].pool)


def test_prompt_logprobs_are_told_by_the_first() -> None:
    """It reads all of the prompt, and the others still begin behind it."""
    model, prompt = fast("softmax"), random_tokens(2 * PIECE, seed=9)
    params = params_of(prompt_logprobs=1)
    engine = engine_of(model, cached=True)
    run(engine, Request(tuple(prompt), params_of(1)))
    with counted(engine) as read:
        (sequences,) = run(engine, Request(tuple(prompt), params))
    assert sum(read) == len(prompt) + N - 1
    assert [len(each.prompt_logprobs) for each in sequences] == [len(prompt), 0, 0, 0]
    assert outputs(sequences) == apart(model, prompt, params)
