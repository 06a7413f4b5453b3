"""Metrics and live figures are what the jobs and steps of a worker were."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import model_dir
from prometheus_client.parser import text_string_to_metric_families

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import Stats
from linspec.engine.results import Generation, Piece
from linspec.llm import LLM
from linspec.serve.loads import KEPT, Loads
from linspec.serve.metrics import Metrics, metric_names
from linspec.serve.shown import plain_speed, shown_drafts
from linspec.serve.worker import Job, Worker

PROMPTS = ["ab cd end ab cd end ab", "the the the", "abcd" * 9]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))


class Watched:
    """A worker with everything that watches it, and a clock for the figures."""

    def __init__(self, drafter: str) -> None:
        self.now, self.asked = 1000.0, 0
        self.metrics, self.loads = Metrics(), Loads(lambda: self.now)
        self.llm = LLM(model_dir("aug"), drafter=drafter, policy=4, max_batch=2)
        self.worker = Worker(self.llm, queue_limit=8)
        self.worker.observe(self.metrics.watch("tiny", self.worker))
        self.worker.observe(self.loads.watch("tiny", self.worker))

    def ask(self, *params: SamplingParams, cancel: bool = False) -> list[Piece]:
        """Pieces of one job for each of `params`; the observers have heard of their ends then."""
        found = asyncio.run(self._ask(params, cancel))
        self.asked += len(params)
        deadline = time.monotonic() + 20
        while self.values()["e2e_request_latency_seconds_count"] < self.asked:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return found

    async def _ask(self, params: tuple[SamplingParams, ...], cancel: bool) -> list[Piece]:
        jobs = [
            self.worker.submit([self.llm.request(prompt, each)], show_drafts=True)
            for prompt, each in zip(PROMPTS, params, strict=False)
        ]
        return [piece for job in jobs for piece in await self._read(job, cancel)]

    async def _read(self, job: Job, cancel: bool) -> list[Piece]:
        found = []
        async for piece in job:
            found.append(piece)
            if cancel:
                job.cancel()
        return found

    def values(self) -> dict[str, float]:
        """The sums of all samples of each name, without the model; by reason where there is one."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.metrics.text().decode()):
            for sample in family.samples:
                assert sample.labels["model_name"] == "tiny"
                key = sample.name.removeprefix("linspec:")
                key += (
                    f" {sample.labels['finished_reason']}"
                    if "finished_reason" in sample.labels
                    else ""
                )
                found[key] = found.get(key, 0.0) + sample.value
        return found


@pytest.fixture(params=["none", "draft-model"])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    drafter = f"draft-model:{model_dir('aug')}" if request.param == "draft-model" else "none"
    found = Watched(drafter)
    yield found
    found.worker.stop(0)


def ended(pieces: list[Piece]) -> list[Generation]:
    return [piece.done for piece in pieces if piece.done]


def test_counts_are_those_of_the_outputs(watched: Watched) -> None:
    found = ended(
        watched.ask(*(SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 20, 13)))
    )
    values, stats = watched.values(), [each.stats for each in found]
    assert values["generation_tokens_total"] == 42
    assert values["prompt_tokens_total"] == sum(each.prompt_tokens for each in found)
    assert values["request_success_total length"] == 3
    # the step of the prompt brings the first token
    assert values["rounds_total"] == sum(each.rounds for each in stats) + 3
    assert values.get("spec_decode_num_draft_tokens_total", 0) == sum(s.drafted for s in stats)
    accepted = sum(each.accepted for each in stats)
    assert values.get("spec_decode_num_accepted_tokens_total", 0) == accepted
    assert values.get("spec_decode_num_accepted_tokens_per_pos_total", 0) == accepted
    assert values.get("spec_decode_num_drafts_total", 0) == sum(s.draft_rounds for s in stats)
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert values[f"{name}_seconds_count"] == 3
    assert values["request_time_per_output_token_seconds_count"] == 3
    assert values["inter_token_latency_seconds_count"] == values["rounds_total"] - 3
    assert values["time_to_first_token_seconds_sum"] <= values["e2e_request_latency_seconds_sum"]
    assert values["num_requests_running"] == values["num_requests_waiting"] == 0
    assert (values["max_num_seqs"], values["state_bytes"]) == (2, 0)


def test_stop_texts_and_callers_that_leave_are_told_apart(watched: Watched) -> None:
    text = ended(watched.ask(SamplingParams(max_tokens=20, ignore_eos=True)))[0].text
    watched.ask(SamplingParams(max_tokens=20, ignore_eos=True, stop=(text[3:5],)))
    watched.ask(SamplingParams(max_tokens=200, ignore_eos=True), cancel=True)
    values = watched.values()
    assert values["request_success_total length"] == 1
    assert values["request_success_total stop"] == 1
    assert values["request_success_total abort"] == 1
    assert values["e2e_request_latency_seconds_count"] == 3


def test_nothing_is_kept_of_jobs_that_have_ended(watched: Watched) -> None:
    watched.ask(*[SamplingParams(max_tokens=5)] * 3)
    observers = watched.worker._observers._observers
    assert not observers[0]._open  # type: ignore[attr-defined]


def test_every_name_is_told_and_no_other(watched: Watched) -> None:
    watched.ask(*[SamplingParams(max_tokens=12, ignore_eos=True)] * 3)
    families = text_string_to_metric_families(watched.metrics.text().decode())
    found = {
        sample.name
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    drafts = {name for name in metric_names() if "spec_decode" in name}
    assert found - metric_names() == set()
    without = set() if watched.llm.engine.drafter else drafts
    unlabelled = {"linspec:prefix_cache_queries_total", "linspec:prefix_cache_hits_total"}
    assert metric_names() - found <= without | unlabelled


def test_seconds_add_up_and_idle_ones_are_empty(watched: Watched) -> None:
    watched.ask(*[SamplingParams(max_tokens=10, ignore_eos=True)] * 3)
    watched.now += 3
    watched.ask(SamplingParams(max_tokens=7, ignore_eos=True))
    watched.now += 2
    told = watched.loads.snapshot()
    json.dumps(told)
    model = told["models"]["tiny"]
    assert len(model["seconds"]) == KEPT
    assert [second["tokens"] for second in model["seconds"][-5:]] == [30, 0, 0, 7, 0]
    busy = model["seconds"][-5]
    # how many waited depends on how many the worker found in its mail at once
    assert 1 <= busy["running"] <= 2 and busy["waiting"] <= 3 and busy["process_bytes"] > 10**6
    assert busy["prompt_tokens"] > 0 and busy["rounds"] <= busy["tokens"]
    assert sum(busy["accepted"].values()) <= busy["drafted"]
    assert (model["slots"], model["running"], model["chat"]) == (2, 0, False)
    watched.now += 10 * KEPT
    assert not any(s["tokens"] for s in watched.loads.snapshot()["models"]["tiny"]["seconds"])


def test_a_follower_gets_every_second_once(watched: Watched) -> None:
    async def follow() -> list[int]:
        found = []
        async for told in watched.loads.follow(every=0):
            found.append(len(told["models"]["tiny"]["seconds"]))
            watched.now += len(found)
            if len(found) == 4:
                break
        return found

    assert asyncio.run(follow()) == [KEPT, 1, 2, 3]


def test_followers_keep_no_server_from_its_end(watched: Watched) -> None:
    async def follow() -> int:
        return len([told async for told in watched.loads.follow(every=0)])

    watched.worker.stop(0)
    assert asyncio.run(follow()) == 0


def test_what_a_stream_shows_is_the_piece(watched: Watched) -> None:
    pieces = watched.ask(SamplingParams(max_tokens=15, ignore_eos=True))
    found = [shown_drafts(piece, watched.llm.tokenizer) for piece in pieces]
    shown = [each for each in found if each is not None]
    assert len(shown) == len(found)
    json.dumps(shown)
    assert "".join(p["text"] for each in shown for p in each["parts"]) == pieces[-1].done.text  # type: ignore[union-attr]
    assert [each["tokens"] for each in shown] == [len(piece.token_ids) for piece in pieces]
    totals = shown[-1]["totals"]
    assert all("totals" not in each for each in shown[:-1])
    assert totals["accepted"] >= sum(each["drafted"] for each in shown)
    assert totals["plain_tokens_per_s"] > 0
    if watched.llm.engine.drafter is None:
        # its rounds are plain ones
        assert totals["plain_tokens_per_s"] == pytest.approx(totals["tokens_per_s"])


def test_plain_decoding_is_estimated_from_the_price_of_drafts() -> None:
    stats = Stats(rounds=10, accepted=10, draft_rounds=5, decode_seconds=1.0)
    assert plain_speed(stats) == (10.0, True)
    stats.draft_price = 2.0
    assert plain_speed(stats) == (15.0, False)
    assert plain_speed(Stats()) == (0.0, False)


def test_preemptions_and_prompts_are_counted_once(watched: Watched) -> None:
    async def ask() -> None:
        low = watched.worker.submit([request(priority=0), request(priority=0)])
        async for _ in low:
            break
        high = watched.worker.submit([request(priority=1)])
        for job in (high, low):
            async for _ in job:
                pass

    def request(priority: int) -> Request:
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        return replace(watched.llm.request(PROMPTS[0], params), priority=priority)

    asyncio.run(ask())
    watched.worker.stop(1)
    values = watched.values()
    assert values["num_preemptions_total"] == 1
    assert values["generation_tokens_total"] == 120
    length = len(watched.llm.encode(PROMPTS[0]))
    assert values["prompt_tokens_total"] == values["prefix_cache_queries_total"] == 3 * length
