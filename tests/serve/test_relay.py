"""A front before replicas that die: asked again while nothing was sent, otherwise an end that says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fronts import front
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from starlette.types import Message, Receive, Scope, Send

from linspec.serve.asgi_call import called
from linspec.serve.failures import Failure
from linspec.serve.fleet import Asked, ReplicaLost
from linspec.serve.merging import merged
from linspec.serve.relay import ATTEMPTS, make_front
from linspec.serve.settings import Settings

EVENTS = [b'data: {"n": %d}\n\n' % n for n in range(4)] + [b"data: [DONE]\n\n"]
KINDS = {True: b"text/event-stream; charset=utf-8", False: b"application/json"}


class Mortal:
    """Answers in `parts`; of attempt n, lives[n] parts are given before the replica dies."""

    def __init__(self, parts: list[bytes], lives: list[int], streams: bool) -> None:
        self.parts, self.lives, self.streams = parts, lives, streams
        self.asked: list[Asked] = []
        self.left = 0
        self.slow = asyncio.Event()
        self.slow.set()

    async def answer(self, asked: Asked) -> AsyncGenerator[Message, None]:
        self.asked.append(asked)
        attempt = len(self.asked) - 1
        lives = self.lives[attempt] if attempt < len(self.lives) else len(self.parts) + 2
        headers = [(b"content-type", KINDS[self.streams]), (b"x-request-id", b"own")]
        messages: list[Message] = [
            {"type": "http.response.start", "status": 200, "headers": headers},
            *({"type": "http.response.body", "body": p, "more_body": True} for p in self.parts),
            {"type": "http.response.body", "body": b"", "more_body": False},
        ]
        try:
            for at, message in enumerate(messages):
                if at == lives:
                    raise ReplicaLost("killed")
                yield message
                if at == 2:
                    await self.slow.wait()
        except (GeneratorExit, asyncio.CancelledError):
            self.left += 1
            raise

    async def metrics(self) -> dict[str, str]:
        return {}

    async def ready(self) -> bool:
        return bool(self.parts)

    def restart(self) -> None: ...

    def stop(self) -> None: ...


@asynccontextmanager
async def client_of(fleet: Mortal, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = make_front(fleet, Settings.model_construct(**options))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        yield client


async def ask(fleet: Mortal, path: str = "/v1/completions") -> httpx.Response:
    async with client_of(fleet) as client:
        return await client.post(path, json={"prompt": "x"}, headers={"x-request-id": "mine"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linspec.serve.relay._PAUSE", 0)


@settings(max_examples=settings().max_examples * 3, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=ATTEMPTS + 1), st.booleans())
def test_a_client_gets_all_of_one_answer_or_an_error_that_names_its_request(
    lives: list[int], streams: bool
) -> None:
    fleet = Mortal(EVENTS, lives, streams)
    reply = asyncio.run(ask(fleet))
    assert reply.headers.get_list("x-request-id") == ["mine"]
    assert {each.request_id for each in fleet.asked} == {"mine"}
    if not streams or all(each < 2 for each in lives[:ATTEMPTS]):
        # dying once more than there are attempts is the end of it
        fatal = len(lives) >= ATTEMPTS
        assert len(fleet.asked) == min(len(lives) + 1, ATTEMPTS)
        assert reply.status_code == (503 if fatal else 200)
        if not fatal:
            assert reply.content == b"".join(EVENTS)
            return
        error = reply.json()["error"]
    else:
        seen = next(each for each in lives if each >= 2) - 1
        sent = b"".join(EVENTS[:seen])
        assert reply.content.startswith(sent)
        if seen == len(EVENTS):
            assert reply.content == sent
            return
        event, done, end = reply.content.removeprefix(sent).split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b"")
        error = json.loads(event.removeprefix(b"data: "))["error"]
    assert error["code"] == "replica_lost" and "mine" in error["message"]


def test_named_events_end_with_a_named_one() -> None:
    reply = asyncio.run(ask(Mortal(EVENTS, [3], True), "/v1/responses"))
    *_, last, end = reply.content.split(b"\n\n")
    name, data = last.split(b"\n")
    assert (name, end) == (b"event: error", b"")
    assert json.loads(data.removeprefix(b"data: "))["type"] == "error"


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/completions", b"data: [DONE]\n\n"),
        ("/v1/responses", b'event: response.completed\ndata: {"a": 1}\n\n'),
    ],
)
def test_a_stream_that_was_complete_when_its_replica_died_got_an_error_behind_its_end(
    path: str, last: bytes
) -> None:
    # one part may hold several events
    for parts in ([*EVENTS[:2], last], [b"".join(EVENTS[:2]) + last]):
        reply = asyncio.run(ask(Mortal(parts, [len(parts) + 1], True), path))
        assert reply.content == b"".join(parts)


@settings(max_examples=settings().max_examples * 2, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=8), st.integers(0, 9))
def test_no_event_is_torn_wherever_a_replica_dies(cuts: list[int], lives: int) -> None:
    whole, at, parts = b"".join(EVENTS), 0, []
    for size in [*cuts, len(whole)]:
        parts.append(whole[at : at + size])
        at += size
    reply = asyncio.run(ask(Mortal(parts, [lives + 1], True)))
    *events, end = reply.content.split(b"\n\n")
    assert end == b"" and events[-1] == b"data: [DONE]"
    assert all(each.startswith(b"data: ") and each[-1:] in b"}]" for each in events)
    assert events.count(b"data: [DONE]") == 1


def test_a_client_that_leaves_ends_the_answer() -> None:
    fleet = Mortal(EVENTS, [], True)
    fleet.slow.clear()

    async def leave() -> None:
        with front(fleet) as address:
            async with (
                httpx.AsyncClient(base_url=address) as client,
                client.stream("POST", "/v1/completions", json={}) as reply,
            ):
                await anext(reply.aiter_bytes())
            for _ in range(500):
                if fleet.left:
                    return
                await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert fleet.left == 1


def test_a_request_that_nobody_answers_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linspec.serve.relay._GRACE_SECONDS", 0)

    async def wait(streams: bool) -> httpx.Response:
        fleet = Mortal(EVENTS, [], streams)
        fleet.slow.clear()
        asyncio.get_running_loop().call_later(0.3, fleet.slow.set)
        async with client_of(fleet, request_seconds=0.1) as client:
            return await client.post("/v1/completions", json={})

    reply = asyncio.run(wait(streams=False))
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    # what streams already is the replica's to end
    assert asyncio.run(wait(streams=True)).content == b"".join(EVENTS)


def test_the_doors_stand_before_the_replicas() -> None:
    async def enter() -> None:
        fleet = Mortal([b"{}"], [], False)
        given = {"api_key": SecretStr("secret-secret"), "max_body_bytes": 100}
        async with client_of(fleet, **given) as client:
            asked = {"json": {"prompt": "x"}}
            assert (await client.post("/v1/completions", **asked)).status_code == 401
            right = {"authorization": "Bearer secret-secret"}
            large = await client.post("/v1/completions", content=b"x" * 101, headers=right)
            assert large.status_code == 413 and not fleet.asked
            reply = await client.post("/v1/completions?a=b", headers=right, **asked)
            assert (reply.status_code, reply.content) == (200, b"{}")
            assert (await client.get("/ready")).status_code == 200
        (one,) = fleet.asked
        assert (one.tenant, one.query, one.body) == ("default", b"a=b", b'{"prompt":"x"}')
        # replicas have no keys, so they get none
        assert all(name != b"authorization" for name, _ in one.headers)
        async with client_of(Mortal([], [], False)) as client:
            assert (await client.get("/ready")).status_code == 503

    asyncio.run(enter())


def asked_of(tenant: str = "") -> Asked:
    return Asked("POST", "/x", b"", (), b"body", "", tenant, "id")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """The body and the tenant, then as many parts as somebody reads."""
    body = (await receive())["body"] + scope["state"]["tenant"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(100):
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def test_an_app_is_asked_message_by_message_and_ends_when_nobody_reads() -> None:
    ended = []

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await echo(scope, receive, send)
        finally:
            ended.append(1)

    async def run(most: int) -> list[bytes]:
        messages = called(watched, asked_of("alice"))
        found = []
        async for message in messages:
            found.append(message.get("body", b""))
            if len(found) == most:
                break
        await messages.aclose()
        return found

    assert asyncio.run(run(-1)) == [b"", *[b"bodyalice"] * 100, b""]
    assert asyncio.run(run(2)) == [b"", b"bodyalice"]
    assert len(ended) == 2


def test_what_breaks_an_app_is_raised_to_who_asks() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise Failure(400, "no")

    async def run() -> None:
        async for _ in called(broken, asked_of()):
            pass

    with pytest.raises(Failure, match="no"):
        asyncio.run(run())


def test_metrics_of_replicas_are_read_as_one_text() -> None:
    text = (
        "# HELP a_total A.\n# TYPE a_total counter\na_total 1.0\n"
        '# HELP b B.\n# TYPE b histogram\nb_bucket{le="1.0"} 2.0\nb_bucket{le="+Inf"} 3.0\nb_count 3.0\n'
    )
    families = list(text_string_to_metric_families(merged({"x": text, "y": text})))
    found = [(each.name, len(each.samples)) for each in families]
    assert found == [("a", 2), ("b", 6)]
    for each in families:
        assert {sample.labels["replica"] for sample in each.samples} == {"x", "y"}
