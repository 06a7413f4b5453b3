"""The worker: many callers, one thread that steps; what each of them gets is what it would get alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import model_dir

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.engine.results import Generation
from linspec.errors import ConfigError, InputError, QueueFull, StateError, WorkerStopped
from linspec.llm import LLM
from linspec.serve.worker import Job, Stepped, Worker

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture
def llm() -> LLM:
    return LLM(model_dir("aug"), max_batch=3, drafter="prompt-lookup")


@pytest.fixture
def worker(llm: LLM) -> Iterator[Worker]:
    with Worker(llm, queue_limit=200) as made:
        yield made


async def read(job: Job) -> list[Generation]:
    found = {(piece.index, piece.sequence): piece.done async for piece in job if piece.done}
    return [each for _, each in sorted(found.items()) if each]


def settled(worker: Worker) -> bool:
    """Whether nothing runs, waits or is kept, at once or soon."""
    deadline = time.monotonic() + 20
    while worker.running or worker.waiting or worker.llm.engine.busy:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def any_params(rng: random.Random) -> SamplingParams:
    hot = rng.random() < 0.7
    return SamplingParams(
        max_tokens=rng.randrange(1, 14),
        temperature=rng.choice((0.5, 1.0)) if hot else 0.0,
        n=rng.choice((1, 1, 2)) if hot else 1,
        seed=rng.randrange(100),
        stop=rng.choice(((), ("a",), ("b", "cd"))),
        frequency_penalty=rng.choice((0.0, 0.5)),
        logprobs=rng.choice((None, 2)),
    )


def test_nobody_is_served_what_another_ones_prompt_has_left() -> None:
    llm = LLM(model_dir("softmax"), prefix_cache="10MB")
    with Worker(llm, queue_limit=9) as worker:
        found = []
        for tenant in ("", "a", "a", "b", ""):
            asked = llm.request("the end of it " * 9, SamplingParams(max_tokens=3))
            (answer,) = asyncio.run(read(worker.submit([asked], tenant=tenant)))
            found.append(answer.cached_tokens > 0)
    assert found == [False, False, True, False, True]


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_callers_gets_what_each_gets_alone(worker: Worker, seed: int) -> None:
    rng = random.Random(seed)
    asked = [
        ("abcd end"[: rng.randrange(1, 9)] * rng.randrange(1, 9), any_params(rng))
        for _ in range(20)
    ]

    async def ask(prompt: str, params: SamplingParams, cancel: bool) -> list[Generation]:
        await asyncio.sleep(rng.random() * 0.05)
        job = worker.submit([worker.llm.request(prompt, params)])
        if cancel:
            await asyncio.sleep(rng.random() * 0.02)
            job.cancel()
            return []
        return await read(job)

    async def together() -> list[list[Generation]]:
        leaving = [ask("the end", LONG, cancel=True) for _ in range(5)]
        found = await asyncio.gather(*(ask(*each, cancel=False) for each in asked), *leaving)
        return list(found[: len(asked)])

    found = asyncio.run(together())
    assert settled(worker)
    for (prompt, params), got in zip(asked, found, strict=True):
        alone = worker.llm.generate(prompt, params)[0].outputs
        assert [(a.token_ids, a.text, a.finish_reason) for a in alone] == [
            (g.token_ids, g.text, g.finish_reason) for g in got
        ]


def test_requests_of_one_job_are_told_apart(worker: Worker) -> None:
    params = SamplingParams(max_tokens=5, n=2, temperature=1.0, seed=1)
    requests = [worker.llm.request(text, params) for text in ("ab", "the end")]

    async def ask() -> list[Generation]:
        return await read(worker.submit(requests))

    alone = [
        each for text in ("ab", "the end") for each in worker.llm.generate(text, params)[0].outputs
    ]
    assert [g.token_ids for g in asyncio.run(ask())] == [a.token_ids for a in alone]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(llm: LLM) -> None:
    with Worker(llm, queue_limit=2) as worker:
        request = llm.request("ab", LONG)
        jobs = [worker.submit([request]) for _ in range(5)]
        with pytest.raises(QueueFull, match="there is room for 5") as caught:
            worker.submit([request])
        assert 1 <= caught.value.retry_after <= 60 and worker.refused == 1
        with pytest.raises(ConfigError, match="asks for 6 outputs"):
            worker.submit([request] * 6)
        jobs[4].cancel()
        jobs[4].cancel()
        deadline = time.monotonic() + 10
        while worker.waiting + worker.running == 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        worker.submit([request]).cancel()
        for job in jobs:
            job.cancel()
        assert settled(worker)


def test_what_add_raises_is_raised_at_once(worker: Worker) -> None:
    with pytest.raises(InputError, match="foreign|token"):
        worker.submit([Request((1,), SamplingParams(logit_bias={10**6: 1.0}))])
    assert worker.waiting == 0


def test_a_job_nobody_reads_holds_nobody_up(worker: Worker) -> None:
    unread = worker.submit([worker.llm.request("ab", LONG)])

    async def ask() -> tuple[list[Generation], list[Generation]]:
        quick = await read(worker.submit([worker.llm.request("cd", SamplingParams(max_tokens=3))]))
        while not unread.over:
            await asyncio.sleep(0.01)
        return quick, await read(unread)

    quick, slow = asyncio.run(ask())
    assert len(quick[0].token_ids) == 3 and len(slow[0].token_ids) == 200


def test_a_broken_step_fails_its_requests_and_not_the_worker(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise MemoryError("no more")

    async def ask() -> list[Generation]:
        return await read(worker.submit([worker.llm.request("ab", SamplingParams(max_tokens=3))]))

    with monkeypatch.context() as patch:
        patch.setattr(worker.llm.engine.rounds, "next", lambda batch: broken())
        with pytest.raises(StateError, match="no more"):
            asyncio.run(ask())
    assert "a step broke" in caplog.text
    assert len(asyncio.run(ask())[0].token_ids) == 3


class Diary:
    """An observer that writes down what it is told, and breaks."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.tokens = 0

    def queued(self, job: Job) -> None:
        self.told.append("queued")
        raise ValueError("a bad day")

    def started(self, job: Job) -> None:
        assert job.started is not None and job.started >= job.queued
        self.told.append("started")

    def stepped(self, step: Stepped) -> None:
        self.tokens += sum(len(outcome.tokens) for _, outcome in step.outcomes)

    def ended(self, job: Job) -> None:
        assert job.first is not None and job.ended is not None and job.first <= job.ended
        self.told.append("ended")


def test_observers_are_told_in_order_and_break_nothing(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    diary = Diary()
    with Worker(llm, observers=[diary]) as worker:
        for _ in range(2):
            job = worker.submit([llm.request("ab", SamplingParams(max_tokens=4, ignore_eos=True))])
            assert [len(g.token_ids) for g in asyncio.run(read(job))] == [4]
    assert diary.told == ["queued", "started", "ended"] * 2
    assert diary.tokens == 8
    assert caplog.text.count("Diary'>.queued failed") == 1


def test_stopping_finishes_what_runs_within_its_time(llm: LLM) -> None:
    worker = Worker(llm)
    job = worker.submit([llm.request("ab", LONG)])
    worker.stop(60)
    assert len(asyncio.run(read(job))[0].token_ids) == 200
    with pytest.raises(WorkerStopped):
        worker.submit([llm.request("ab")])
    assert not worker.ready


def test_stopping_at_once_fails_what_runs(llm: LLM) -> None:
    worker = Worker(llm)
    job = worker.submit([llm.request("ab", LONG)] * 5)
    worker.stop(0)
    with pytest.raises(WorkerStopped, match="not finished in time"):
        asyncio.run(read(job))
    assert not llm.engine.busy


def test_the_llm_may_be_used_beside_its_worker(worker: Worker) -> None:
    params = SamplingParams(max_tokens=20)
    alone = [
        LLM(model_dir("aug")).generate(text, params)[0].token_ids for text in ("ab", "the end")
    ]
    job = worker.submit([worker.llm.request("ab", params)])
    beside = worker.llm.generate("the end", params)[0].token_ids
    assert [asyncio.run(read(job))[0].token_ids, beside] == alone
