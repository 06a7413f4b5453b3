"""Many clients at once, a small queue, slow readers, and a server that is told to end."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import quiet, running, talker
from server_process import Served

from linspec.llm import LLM
from linspec.serve.run import Server, server_config
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker

LONG = {"prompt": "ab", "max_tokens": 4000, "ignore_eos": True}
SHORT = {"prompt": "ab", "max_tokens": 5, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def narrow() -> Iterator[tuple[str, Worker]]:
    """A server with two slots and room for six more."""
    settings = Settings.read(None, queue_limit=6, request_seconds=60)
    with running({"talker": LLM(talker(), max_batch=2)}, settings) as (address, workers):
        yield address, workers["talker"]


def test_two_hundred_clients_at_a_small_queue_are_served_or_told_when(
    narrow: tuple[str, Worker],
) -> None:
    address, worker = narrow

    async def ask(web: httpx.AsyncClient, at: int) -> tuple[int, str]:
        got = await web.post("/v1/completions", json={**SHORT, "stream": at % 3 == 0})
        if got.status_code == 429:
            assert 1 <= int(got.headers["retry-after"]) <= 60
            assert got.json()["error"]["code"] == "queue_full"
            return 429, ""
        assert got.status_code == 200, got.text
        return 200, "" if at % 3 == 0 else got.json()["choices"][0]["text"]

    async def all_of_them() -> list[tuple[int, str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as web:
            return list(await asyncio.gather(*(ask(web, at) for at in range(200))))

    found = asyncio.run(all_of_them())
    statuses = Counter(status for status, _ in found)
    assert statuses[200] >= 8 and statuses[200] + statuses[429] == 200
    assert len({text for _, text in found} - {""}) == 1
    assert worker.refused == statuses[429]
    assert quiet(worker)


@pytest.mark.slow
def test_a_thousand_connections_at_once_are_all_answered(narrow: tuple[str, Worker]) -> None:
    address, worker = narrow

    async def ask(web: httpx.AsyncClient) -> int:
        return (await web.post("/v1/completions", json=SHORT)).status_code

    async def all_of_them() -> Counter[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as web:
            return Counter(await asyncio.gather(*(ask(web) for _ in range(1000))))

    found = asyncio.run(all_of_them())
    assert set(found) <= {200, 429} and sum(found.values()) == 1000
    assert found[200] >= 8 and quiet(worker)


def test_more_outputs_than_there_is_ever_room_for_is_a_400(narrow: tuple[str, Worker]) -> None:
    got = httpx.post(f"{narrow[0]}/v1/completions", json={**LONG, "n": 9})
    assert got.status_code == 400
    assert "room for 8" in got.json()["error"]["message"]


def test_a_reader_that_does_not_read_holds_nobody_up(narrow: tuple[str, Worker]) -> None:
    address, worker = narrow
    host, port = address.removeprefix("http://").split(":")
    body = (
        b'{"prompt": "ab", "max_tokens": 3000, "ignore_eos": true, "stream": true, "logprobs": 5}'
    )
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        while not worker.running:
            time.sleep(0.005)
        got = httpx.post(f"{address}/v1/completions", json=SHORT, timeout=30)
        assert got.status_code == 200
        # what was written for it waits there, and its slot is free again
        assert quiet(worker, 60)


def test_a_request_that_takes_too_long_is_a_504() -> None:
    settings = Settings.read(None, request_seconds=0.2)
    with running({"talker": LLM(talker())}, settings) as (address, workers):
        got = httpx.post(f"{address}/v1/completions", json=LONG)
        assert got.status_code == 504 and got.json()["error"]["type"] == "timeout_error"
        streamed = httpx.post(f"{address}/v1/completions", json={**LONG, "stream": True})
        assert streamed.status_code == 200 and '"code":"timeout"' in streamed.text
        assert quiet(workers["talker"])


def test_a_step_that_breaks_is_a_503_and_the_next_request_is_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running({"talker": LLM(talker())}) as (address, workers):

        def broken(batch: object) -> None:
            raise RuntimeError("no luck")

        with monkeypatch.context() as patch:
            patch.setattr(workers["talker"].llm.engine.rounds, "next", broken)
            got = httpx.post(f"{address}/v1/completions", json=SHORT)
            assert got.status_code == 503 and "no luck" in got.json()["error"]["message"]
        assert httpx.post(f"{address}/v1/completions", json=SHORT).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200


async def under_signal(served: Served, sent: signal.Signals) -> list[tuple[str, int]]:
    """Streams that run while the signal comes: the last line of each, and how many there were."""

    async def ask(web: httpx.AsyncClient) -> tuple[str, int]:
        body = {**LONG, "max_tokens": 300, "stream": True}
        async with web.stream("POST", "/v1/completions", json=body) as got:
            assert got.status_code == 200
            lines = []
            async for line in got.aiter_lines():
                if line:
                    lines.append(line)
                begun.add(id(got))
        return lines[-1], len(lines)

    begun: set[int] = set()
    async with httpx.AsyncClient(base_url=served.address, timeout=60) as web:
        asking = [asyncio.create_task(ask(web)) for _ in range(6)]
        while len(begun) < 6:
            await asyncio.sleep(0.01)
        served.process.send_signal(sent)
        return list(await asyncio.gather(*asking))


@pytest.mark.parametrize(
    "sent",
    [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_under_load_ends_the_server_when_all_is_answered(
    tmp_path: Path, sent: signal.Signals
) -> None:
    served = Served(f"mine={talker()}", cache=tmp_path)
    found = asyncio.run(under_signal(served, sent))
    printed = served.end()
    assert [last for last, _ in found] == ["data: [DONE]"] * 6, printed
    assert all(count > 2 for _, count in found)
    assert served.process.returncode == 0, printed
    assert "mine: weights" in printed and "8 slots of" in printed
    # the log has no text of prompts
    assert '"path": "/v1/completions"' in printed and "prompt" not in printed
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.address}/health")


@pytest.mark.parametrize("meant", [signal.SIG_IGN, lambda *_: None])
def test_a_closed_terminal_means_what_it_meant_before(meant: Any) -> None:
    """Behind nohup a server goes on, and a front replaces its replicas."""
    settings = Settings.read(None)
    server = Server(server_config(None, settings), [], settings)
    before = signal.signal(signal.SIGHUP, meant)
    try:
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) is meant
            assert signal.getsignal(signal.SIGTERM) == server.handle_exit
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) == server.handle_exit
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_not_finished_in_time_ends_with_an_error(tmp_path: Path) -> None:
    served = Served(talker(), "--shutdown-seconds", "0", "--max-batch", "1", cache=tmp_path)

    async def ask() -> str:
        async with httpx.AsyncClient(base_url=served.address, timeout=60) as web:
            body = {**LONG, "stream": True}
            async with web.stream("POST", "/v1/completions", json=body) as got:
                lines = got.aiter_lines()
                text = await anext(lines)
                served.process.send_signal(signal.SIGTERM)
                return text + "".join([line async for line in lines])

    text = asyncio.run(ask())
    printed = served.end()
    assert "shutting_down" in text and text.endswith("data: [DONE]"), printed
    assert served.process.returncode == 0, printed


def test_the_next_server_on_a_prefix_store_reads_no_prompt_again(tmp_path: Path) -> None:
    asked = {"prompt": "ab cd " * 20, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    model, store = f"mine={talker('softmax')}", tmp_path / "store"
    cached = []
    for _ in range(2):
        served = Served(model, "--prefix-store", store, cache=tmp_path)
        got = httpx.post(f"{served.address}/v1/completions", json=asked, timeout=60).json()
        cached.append(got["usage"]["prompt_tokens_details"]["cached_tokens"])
        served.process.send_signal(signal.SIGTERM)
        printed = served.end()
        assert served.process.returncode == 0, printed
    assert cached[0] == 0 and cached[1] > 0
