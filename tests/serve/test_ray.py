"""Two replicas on Ray Serve: one is killed under load, both are replaced, and no request is lost."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
from api_server import talker
from fronts import front

from linspec.errors import ConfigError
from linspec.serve.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed"),
    pytest.mark.filterwarnings("default"),
    # starting a replica is starting Python and torch
    pytest.mark.timeout(1200),
]
TOKENS, REQUESTS = 400, 48
CHAT = "/v1/chat/completions"


@dataclass
class Running:
    """A front and what stands behind it."""

    address: str
    fleet: Any

    def pids(self) -> list[int]:
        """The processes of the replicas."""
        sign = f"ray::ServeReplica:{self.fleet.name}:"
        found = []
        for each in psutil.process_iter(["cmdline"]):
            if (each.info["cmdline"] or [""])[0].startswith(sign):
                found.append(each.pid)
        return sorted(found)

    def wait_for_two(self, but: Collection[int] = ()) -> None:
        """Until two replicas answer that are none of `but`."""
        until = time.monotonic() + 300
        while (
            len(set(self.pids()).difference(but)) != 2
            or len(asyncio.run(self.fleet.metrics())) != 2
        ):
            assert time.monotonic() < until, "the replicas did not come back"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def two() -> Iterator[Running]:
    pytest.importorskip("ray")
    from linspec.serve.ray_fleet import RayFleet
    from linspec.serve.ray_found import cpus_of_each, ray_running

    settings = Settings.read(replicas=2, ray=True, max_batch=4, shutdown_seconds=120)
    with ray_running():
        fleet = RayFleet({"tiny": str(talker())}, settings, {}, cpus_of_each(2))
        try:
            with front(fleet, settings) as address:
                yield Running(address, fleet)
        finally:
            fleet.stop()


def body(n: int, **more: Any) -> dict[str, Any]:
    turn = {"role": "user", "content": f"{n} def f("}
    return {"messages": [turn], "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True} | more


@dataclass
class Got:
    """What a client has seen of a request."""

    text: str = ""
    error: dict[str, Any] | None = None
    request_id: str = ""


async def ask(client: httpx.AsyncClient, n: int) -> Got:
    """Every other request streams."""
    if n % 2:
        reply = await client.post(CHAT, json=body(n))
        assert reply.status_code == 200, reply.text
        return Got(reply.json()["choices"][0]["message"]["content"])
    got = Got()
    async with client.stream("POST", CHAT, json=body(n, stream=True)) as reply:
        assert reply.status_code == 200
        got.request_id = reply.headers["x-request-id"]
        # httpx would break lines where texts have separators of their own
        *events, last, end = (await reply.aread()).split(b"\n\n")
    assert (last, end) == (b"data: [DONE]", b"")
    for event in map(json.loads, (each.removeprefix(b"data: ") for each in events)):
        got.error = event.get("error")
        for choice in event.get("choices", ()):
            got.text += choice["delta"].get("content") or ""
    return got


async def load(address: str, requests: int, at_once: int, event: Any) -> list[Got]:
    """Answers to all; event: called once, when a third of them is there."""
    found: list[Got] = [Got()] * requests
    left, done = iter(range(requests)), 0

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal done
        for n in left:
            found[n] = await ask(client, n)
            done += 1
            if done == requests // 3:
                await asyncio.to_thread(event)

    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        await asyncio.gather(*(work(client) for _ in range(at_once)))
    return found


def check(got: list[Got], expected: list[Got]) -> int:
    """Every answer is the expected one, or ends with an error that names its request; returns how many do."""
    broken = 0
    for n, (each, whole) in enumerate(zip(got, expected, strict=True)):
        if each.error is None:
            assert each.text == whole.text, n
            continue
        broken += 1
        assert each.request_id and each.request_id in each.error["message"]
        assert each.error["code"] == "replica_lost" and each.error["type"] == "service_unavailable"
        assert whole.text.startswith(each.text)
    return broken


def test_replicas_stand_back_behind_other_programs_no_more_than_a_server_without_ray(
    two: Running,
) -> None:
    two.wait_for_two()
    mine = psutil.Process().nice()
    assert {psutil.Process(pid).nice() for pid in two.pids()} == {mine}


def test_one_of_two_is_killed_under_load_and_no_request_is_lost(
    two: Running, caplog: pytest.LogCaptureFixture
) -> None:
    two.wait_for_two()
    expected = asyncio.run(load(two.address, REQUESTS, 12, lambda: None))
    assert check(expected, expected) == 0 and all(each.text for each in expected)
    assert both_have_answered(two)
    killed = two.pids()[0]
    got = asyncio.run(load(two.address, REQUESTS, 12, lambda: os.kill(killed, signal.SIGKILL)))
    broken = check(got, expected)
    lost = [record for record in caplog.records if record.getMessage() == "replica lost"]
    # what streamed ended with an error, the others were asked again
    assert len(lost) > broken or (lost and broken)
    assert httpx.get(f"{two.address}/ready").status_code == 200
    two.wait_for_two(but={killed})


def test_a_rolling_restart_under_load_is_noticed_by_nobody(two: Running) -> None:
    two.wait_for_two()
    before = set(two.pids())
    expected = asyncio.run(load(two.address, REQUESTS, 6, lambda: None))
    got = asyncio.run(load(two.address, REQUESTS, 6, two.fleet.restart))
    assert check(got, expected) == 0
    two.wait_for_two(but=before)
    assert not before & set(two.pids())


def both_have_answered(two: Running) -> bool:
    texts = asyncio.run(two.fleet.metrics()).values()
    return all("linspec:request_success_total{" in text for text in texts)


def test_chats_stay_where_they_began_and_a_client_that_leaves_frees_its_slot(two: Running) -> None:
    two.wait_for_two()
    turns = [{"role": "user", "content": "Tell me of the sea. " * 20}]
    with httpx.Client(base_url=two.address, timeout=60) as client:
        for turn in range(4):
            asked = {"messages": turns, "temperature": 0, "max_tokens": 4}
            usage = client.post(CHAT, json=asked).json()["usage"]
            # a reading leaves a state where its last piece begins, in the replica that had it
            assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == (turn > 0)
            turns.append({"role": "assistant", "content": "It is deep."})
            turns.append({"role": "user", "content": "More."})
        with client.stream("POST", CHAT, json=body(0, stream=True, max_tokens=4000)) as reply:
            next(reply.iter_lines())
    until = time.monotonic() + 20
    while any(" 1.0" in line for line in running_of(two)):
        assert time.monotonic() < until, "the slot is still taken"
        time.sleep(0.1)


def running_of(two: Running) -> list[str]:
    lines = httpx.get(f"{two.address}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("linspec:num_requests_running{")]
    assert len(found) == 2
    return found


def test_what_a_replica_cannot_load_is_said_as_it_is_without_ray(two: Running) -> None:
    from linspec.serve.ray_fleet import RayFleet

    settings = Settings.read(ray=True)
    options = {"drafter": "medusa:nowhere"}
    with pytest.raises(ConfigError, match="do not start: no drafter of kind 'medusa' in nowhere"):
        RayFleet({"tiny": str(talker())}, settings, options, cpus=0)
    # the others go on
    assert httpx.get(f"{two.address}/ready").status_code == 200
