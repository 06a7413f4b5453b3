"""Who has to make room for others loses nothing by it, and what can never fit is refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
from checkpoints import model_dir
from helpers import random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import DRAFTERS

from linspec import LLM, Request, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.engine.engine import Engine
from linspec.engine.preemption import StateMemory
from linspec.errors import ConfigError, ContextOverflow
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

SLOTS = 4
MODELS: dict[str, Decoder] = {
    "softmax": tiny_model("softmax").to_inference(),
    "aug": tiny_model("aug").to_inference(),
    "mixed": tiny_model("softmax", "aug").to_inference(),
}
PROMPTS = [random_tokens(n, seed=n) for n in (130, 3, 200, 70, 64, 17)]


def engine_of(model: Decoder, drafter: str | None = None, **settings: Any) -> Engine:
    return Engine(
        model,
        verifier=LosslessVerifier(),
        drafter=DRAFTERS[drafter](model) if drafter else None,
        policy=Fixed(4),
        **{"slots": SLOTS} | settings,
    )


def run(engine: Engine, requests: Sequence[Request], apart: int = 0) -> list[RunningSequence]:
    """The ended sequence of each request; they come so many steps apart."""
    waiting, asked = list(requests), list[int]()
    done: dict[int, RunningSequence] = {}
    for step in count():
        while waiting and step >= apart * len(asked):
            asked.append(engine.add(waiting.pop(0)))
        if not (engine.busy or waiting):
            break
        for outcome in engine.step():
            assert outcome.error is None
            if outcome.finished:
                done[outcome.sequence.request] = outcome.sequence
        memory = engine.scheduler.memory
        if memory is not None:
            taken = sum(engine.state.bytes(each.slot) for each in engine.scheduler.running)
            assert taken <= memory.limit
    assert engine.scheduler.free == list(range(engine.scheduler.slots))
    return [done[handle] for handle in asked]


def output(row: RunningSequence) -> list[int]:
    return row.tokens[row.prompt_length :]


def alone(model: Decoder, request: Request) -> list[int]:
    (row,) = run(engine_of(model), [request])
    return output(row)


def memory_for(model: Decoder, *tokens: int) -> int:
    """Bytes of the states of sequences of so many tokens."""
    return sum(model.new_state().bytes_at(each) for each in tokens)


PARAMS = [
    SamplingParams(max_tokens=n, temperature=t, seed=n, ignore_eos=True)
    for n, t in zip((90, 250, 40, 120, 5, 160), (0.0, 1.0, 0.0, 0.7, 0.0, 0.0), strict=True)
]


@pytest.mark.crossed(6)
@pytest.mark.parametrize("budget", [64, 128, 512])
@pytest.mark.parametrize("drafter", [None, "lookup", "chimera", "suffix"])
def test_a_mixed_trace_gets_what_each_request_gets_alone(drafter: str | None, budget: int) -> None:
    """Sarathi-Serve's invariant A, with so little memory that sequences have to leave all the time."""
    model = MODELS["mixed"]
    requests = [
        Request(tuple(prompt), params, priority=(0, 0, 1, 2, 3, 1)[i])
        for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    engine = engine_of(
        model, drafter, prefill_tokens=budget, state_bytes=memory_for(model, 300, 300)
    )
    rows = run(engine, requests, apart=4)
    assert sum(row.preempted for row in rows) >= 2
    assert [output(row) for row in rows] == [alone(model, each) for each in requests]


def test_the_newest_leaves_when_the_states_grow_beyond_their_memory() -> None:
    model = MODELS["softmax"]
    requests = [
        Request(tuple(random_tokens(20, seed=i)), SamplingParams(max_tokens=400, ignore_eos=True))
        for i in range(3)
    ]
    rows = run(engine_of(model, state_bytes=memory_for(model, 450, 450)), requests)
    assert rows[0].preempted == 0
    # room to grow is left to all: nobody leaves again and again
    assert 1 <= sum(row.preempted for row in rows) <= 3
    assert [output(row) for row in rows] == [alone(model, each) for each in requests]


def test_a_higher_priority_takes_the_place_of_the_newest_of_the_lowest() -> None:
    engine = engine_of(MODELS["aug"], slots=3)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    for priority in (1, 0, 0):
        engine.add(Request((5, 6), params, priority=priority))
    engine.step()
    urgent = engine.add(Request((7, 8, 9), params, priority=2))
    engine.step()
    assert sorted(each.request for each in engine.scheduler.running) == [1, 2, urgent]
    assert [each.request for each in engine.scheduler.waiting] == [3]
    # equals wait for each other
    engine.add(Request((7, 8), params, priority=0))
    engine.step()
    assert (engine.running, engine.waiting) == (3, 2)
    assert [each.request for each in engine.scheduler.waiting] == [3, 5]


def test_nobody_leaves_for_one_that_would_not_fit_even_so() -> None:
    model = MODELS["softmax"]
    engine = engine_of(model, state_bytes=memory_for(model, 700))
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    engine.add(Request(tuple(random_tokens(300)), params, priority=5))
    engine.add(Request(tuple(random_tokens(10)), params))
    engine.step()
    assert engine.running == 2
    engine.add(Request(tuple(random_tokens(400)), params, priority=4))
    for _ in range(5):
        engine.step()
        assert (engine.running, engine.waiting) == (2, 1)


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    model = MODELS["softmax"]
    limit = memory_for(model, 100)
    engine = engine_of(model, state_bytes=limit)
    needed = memory_for(model, 120 + 1)
    with pytest.raises(ContextOverflow, match=rf"120 tokens .* {needed} bytes; .* {limit}"):
        engine.add(Request(tuple(random_tokens(120)), SamplingParams(max_tokens=50)))
    assert not engine.busy
    # as max_model_len does, memory ends an output
    (row,) = run(engine, [Request(tuple(random_tokens(60)), SamplingParams(max_tokens=500))])
    assert row.emitted == 40
    with pytest.raises(ContextOverflow, match="41 more at least"):
        engine.add(Request(tuple(random_tokens(60)), SamplingParams(max_tokens=50, min_tokens=41)))


@pytest.mark.parametrize("given", [0, -5, True, 2.5, "1GB", 7])
def test_a_memory_that_is_none_or_too_little_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="state_bytes must be"):
        engine_of(MODELS["aug"], state_bytes=given)


def test_priorities_are_whole_numbers() -> None:
    with pytest.raises(Exception, match="priority must be of type int"):
        engine_of(MODELS["aug"]).add(Request((1,), priority="high"))  # type: ignore[arg-type]


def test_states_that_do_not_grow_are_counted_alike_at_every_length() -> None:
    memory = StateMemory(MODELS["aug"].new_state(2), memory_for(MODELS["aug"], 1))
    assert memory.room(10**6, 10**6) == 10**6
    engine = engine_of(MODELS["aug"], state_bytes=2 * memory.limit + 5)
    for _ in range(3):
        engine.add(Request((1, 2), SamplingParams(max_tokens=5, ignore_eos=True)))
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)


def test_what_waits_with_a_snapshot_can_be_aborted_and_ended_early() -> None:
    engine = engine_of(MODELS["aug"], slots=1)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for end in ("abort", "retire"):
        low = engine.add(Request((5, 6), params))
        (row,) = [each.sequence for each in engine.step()]
        high = engine.add(Request((7,), params, priority=1))
        engine.step()
        assert row.parked is not None and row.slot == -1
        # its caller finds a stop string in what it had got before
        engine.abort(low) if end == "abort" else engine.retire(row)
        assert engine.waiting == 0
        ended = set()
        while engine.busy:
            ended |= {each.sequence.request for each in engine.step()}
        assert ended == {high}


def test_a_drafter_that_cannot_let_go_fails_its_own_sequence_alone() -> None:
    model = MODELS["aug"]
    engine = engine_of(model, "lookup", slots=1)
    drafter: Any = engine.drafter
    kept, drafter.paused = drafter.paused, lambda sequence: 1 / 0
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.add(Request((5, 6), params))
    engine.step()
    engine.add(Request((7, 8), params, priority=1))
    outcomes = engine.step()
    assert [type(each.error) for each in outcomes][:1] == [ZeroDivisionError]
    drafter.paused = kept
    done = []
    while engine.busy:
        done += [each.sequence for each in engine.step() if each.finished]
    assert [output(row) for row in done] == [alone(model, Request((7, 8), params))]


def test_a_loop_that_cannot_let_go_counts_sequences_at_their_greatest_length() -> None:
    model = MODELS["softmax"]
    engine = engine_of(model, loop="beam:width=2", state_bytes=memory_for(model, 130, 130))
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    for priority in range(3):
        engine.add(Request(tuple(random_tokens(25)), params, priority=priority))
    while engine.busy:
        engine.step()
        assert engine.running <= 2


def test_an_llm_takes_the_settings() -> None:
    wrong: dict[str, Any]
    for wrong in ({"tbt_ms": 0}, {"state_bytes": 0}, {"tbt_ms": "5"}):
        with pytest.raises(ConfigError, match="must be"):
            LLM(model_dir("aug"), **wrong)
    llm = LLM(model_dir("softmax"), tbt_ms=5, state_bytes=10**6)
    memory = llm.engine.scheduler.memory
    assert memory is not None and memory.limit == 10**6
    assert llm.engine.scheduler.budget.tbt_ms == 5
    plain = LLM(model_dir("softmax"))
    params = SamplingParams(max_tokens=5)
    prompts = ["abcd " * 40, "the end"]
    assert [each.text for each in llm.generate(prompts, params)] == [
        each.text for each in plain.generate(prompts, params)
    ]


Act = tuple[str, int, int, int]
ACTS = st.tuples(
    st.sampled_from(("submit", "submit", "abort", "step", "step")),
    st.integers(1, 150),
    st.integers(1, 60),
    st.integers(0, 2),
)


@given(st.lists(ACTS, min_size=5, max_size=25), st.sampled_from((None, 220, 420)))
@settings(max_examples=15)
def test_any_history_gives_each_request_its_own_tokens(acts: list[Act], room: int | None) -> None:
    """Submitted and dropped at any time, of any priority: nothing is lost, repeated or left behind."""
    model = MODELS["mixed"]
    limit = None if room is None else memory_for(model, room)
    engine = engine_of(model, "lookup", slots=2, prefill_tokens=64, state_bytes=limit)
    asked: dict[int, Request] = {}
    got: dict[int, list[int]] = {}
    ended: set[int] = set()

    def step() -> None:
        for outcome in engine.step():
            assert outcome.sequence.request not in ended
            got[outcome.sequence.request] += outcome.tokens
            if outcome.finished:
                ended.add(outcome.sequence.request)

    for what, size, length, priority in acts:
        if what == "submit":
            temperature = 0.9 if size % 2 else 0.0
            params = SamplingParams(
                max_tokens=length, temperature=temperature, seed=size, ignore_eos=True
            )
            request = Request(tuple(random_tokens(size, seed=size)), params, priority=priority)
            handle = engine.add(request)
            asked[handle], got[handle] = request, []
        elif what == "abort" and asked:
            ended.add(handle := sorted(asked)[size % len(asked)])
            engine.abort(handle)
            del asked[handle]
        else:
            step()
    while engine.busy:
        step()
    assert engine.scheduler.free == [0, 1] and engine.waiting == 0
    for handle, request in asked.items():
        assert got[handle] == alone_once(model, request), handle


KNOWN: dict[tuple[Any, ...], list[int]] = {}


def alone_once(model: Decoder, request: Request) -> list[int]:
    params = request.params
    key = (request.prompt, params.max_tokens, params.temperature, params.seed)
    if key not in KNOWN:
        KNOWN[key] = alone(model, request)
    return KNOWN[key]
