"""The front of several replicas: it passes requests on, and asks again where a replica died.

app = make_front(fleet, Settings(replicas=2))

A request whose replica died is asked of another one as long as its client has seen nothing of an answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linspec.serve import failures
from linspec.serve.failures import Failure, json_text
from linspec.serve.fleet import Asked, Fleet, ReplicaLost
from linspec.serve.front import put_front
from linspec.serve.keys import Keys
from linspec.serve.merging import merged
from linspec.serve.metrics import CONTENT_TYPE
from linspec.serve.routing import opening
from linspec.serve.schemas.others import Health
from linspec.serve.settings import Settings

_log = logging.getLogger("linspec.serve")
# a request that kills whoever answers it must not kill all
ATTEMPTS = 4
_PAUSE = 0.1
# how much later than replicas, which say it better, the front ends what takes too long
_GRACE_SECONDS = 5
# bodies that take longer to read are read beside the streams of others
_LARGE = 2**16
# of one connection, or told anew
_OWN_HEADERS = frozenset((b"connection", b"transfer-encoding", b"x-request-id", b"date", b"server"))


def make_front(fleet: Fleet, settings: Settings) -> ASGIApp:
    """The app that stands before `fleet`, with the doors of a server; raises ConfigError for bad keys."""
    keys = Keys.of(settings)
    # pages about the API are the replicas'
    app = FastAPI(openapi_url=None)
    failures.install(app)

    @app.get("/health")
    async def health() -> Health:
        return Health(status="ok")

    @app.get("/ready")
    async def ready() -> Health:
        if not await fleet.ready():
            raise Failure(503, "no replica takes requests now; ask again", code="not_ready")
        return Health(status="ok")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(merged(await fleet.metrics()), media_type=CONTENT_TYPE)

    app.mount("/", Relay(fleet, settings.request_seconds + _GRACE_SECONDS))
    put_front(app, keys, settings)
    return app


class Relay:
    """Passes requests on to `fleet`; after `seconds`, an answer must have begun."""

    def __init__(self, fleet: Fleet, seconds: float) -> None:
        self.fleet, self.seconds = fleet, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, until it is answered or its client leaves."""
        asked = await _asked(scope, receive)
        answering = asyncio.ensure_future(self._in_time(asked, send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for each in (answering, leaving):
                each.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _in_time(self, asked: Asked, send: Send) -> None:
        limit = asyncio.timeout(self.seconds)
        try:
            async with limit:
                await self._answer(_Answer(send, asked, limit))
        except TimeoutError:
            raise Failure(
                504, "no replica has answered in time; ask later", code="timeout"
            ) from None

    async def _answer(self, answer: _Answer) -> None:
        asked = answer.asked
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(self.fleet.answer(asked)) as messages:
                    async for message in messages:
                        await answer.take(message)
                return
            except ReplicaLost as lost:
                facts = {"request_id": asked.request_id, "attempt": attempt, "reason": str(lost)}
                _log.warning("replica lost", extra={"facts": facts})
                if answer.begun:
                    await answer.end_with(_lost(asked, "has died while it streamed the answer"))
                    return
                await asyncio.sleep(_PAUSE * attempt)
        raise _lost(asked, f"has died, {ATTEMPTS} times in a row")


def _lost(asked: Asked, what: str) -> Failure:
    return Failure(
        503,
        f"the replica that answered request {asked.request_id} {what}; send the request again",
        code="replica_lost",
    )


# events behind which nothing comes
_LAST = re.compile(rb"data: \[DONE\]|event: (?:error|response\.(?:completed|incomplete|failed))\n")


class _Answer:
    """What a client gets: whole events of a stream, and anything else when it is complete.

    begun: whether the client has some of it, after which no time limit holds.
    """

    def __init__(self, send: Send, asked: Asked, limit: asyncio.Timeout) -> None:
        self._send, self.asked, self._limit = send, asked, limit
        self.begun = self._complete = False

    async def take(self, message: Message) -> None:
        """The next message of a replica."""
        if message["type"] == "http.response.start":
            headers = [each for each in message["headers"] if each[0].lower() not in _OWN_HEADERS]
            self._start, self._held = {**message, "headers": headers}, b""
            kinds = (value for name, value in headers if name.lower() == b"content-type")
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            self._held += message.get("body", b"")
            if not message.get("more_body", False):
                await self._pass_on(len(self._held), more=False)
            # events that are torn would be read as broken ones
            elif self._streams and (end := self._held.rfind(b"\n\n")) >= 0:
                last = self._held[:end].rpartition(b"\n\n")[2]
                self._complete = _LAST.match(last) is not None
                await self._pass_on(end + 2, more=True)

    async def _pass_on(self, size: int, *, more: bool) -> None:
        part, self._held = self._held[:size], self._held[size:]
        if not self.begun:
            self.begun = True
            self._limit.reschedule(None)
            await self._send(self._start)
        await self._send({"type": "http.response.body", "body": part, "more_body": more})

    async def end_with(self, failure: Failure) -> None:
        """End a stream that has begun: with an error as its last event, unless it had its last one."""
        if self._complete:
            text = ""
        elif self.asked.path == "/v1/responses":
            text = f"event: error\ndata: {json_text(failure.event())}\n\n"
        else:
            text = f"data: {json_text(failure.body())}\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": False})


async def _asked(scope: Scope, receive: Receive) -> Asked:
    """The whole of a request."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Failure(499, "the client has left", code="client_left")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body, state, path = b"".join(parts), scope["state"], scope["path"]
    asked = Asked(
        method=scope["method"],
        path=path,
        query=scope["query_string"],
        headers=tuple(_passed_on(scope, state["request_id"])),
        body=body,
        key="",
        tenant=state["tenant"],
        request_id=state["request_id"],
    )
    return replace(asked, key=await _key(asked))


async def _key(asked: Asked) -> str:
    """Where it belongs; what belongs nowhere in particular is spread, pages and their parts are not."""
    if asked.method != "POST":
        return asked.path.lstrip("/").partition("/")[0]
    if len(asked.body) > _LARGE:
        found = await run_in_threadpool(opening, asked.path, asked.body, asked.tenant)
    else:
        found = opening(asked.path, asked.body, asked.tenant)
    return asked.request_id if found is None else found


def _passed_on(scope: Mapping[str, object], request_id: str) -> list[tuple[bytes, bytes]]:
    """Headers of the request, without those that the doors have read."""
    left_out = {b"authorization", b"x-request-id", b"connection", b"transfer-encoding", b"expect"}
    headers: list[tuple[bytes, bytes]] = list(scope["headers"])  # type: ignore[call-overload]
    kept = [(name, value) for name, value in headers if name not in left_out]
    return [*kept, (b"x-request-id", request_id.encode())]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
