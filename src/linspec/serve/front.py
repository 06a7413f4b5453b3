"""What every request passes first: an id, a line in the log, a key, and limits of its body.

Plain ASGI: frameworks' middlewares hold streams back and hide clients that leave.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linspec.serve.body import Body, header
from linspec.serve.failures import Failure, failure_of, head_too_large
from linspec.serve.keys import Keys
from linspec.serve.settings import Settings

_log = logging.getLogger("linspec.serve.access")
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# what needs no key: a page holds no secrets, and what watches a server has none
OPEN = frozenset(("/", "/health", "/ready"))
OPEN_FOLDER = "/page/"
# bytes of a request's head; a connection refuses longer ones by itself where they come in several pieces
_MOST_HEAD = 2**14


def put_front(app: FastAPI, keys: Keys, settings: Settings) -> None:
    """Put `app` behind its doors, and let pages of the origins that the settings name ask it."""
    app.add_middleware(Front, keys=keys, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )


class Front:
    """An app behind its doors."""

    def __init__(self, app: ASGIApp, *, keys: Keys, settings: Settings) -> None:
        self.app, self.keys = app, keys
        self._most, self._seconds = settings.max_body_bytes, settings.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = _Visit(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = visit.number
        try:
            _check_head(scope)
            # the doors in front of several replicas know it already
            state.setdefault("tenant", self._tenant(scope))
            body = Body(scope, receive, self._most, self._seconds)
            await self.app(scope, body.receive, visit.sending(send))
        except Exception as error:
            failure = failure_of(error)
            # an answer that has begun can only end
            if visit.status:
                raise
            await failure.response()(scope, receive, visit.sending(send))
        finally:
            visit.log()

    def _tenant(self, scope: Scope) -> str:
        """Whose key it is, '' where nobody needs one."""
        path = scope["path"]
        if not self.keys or path in OPEN or path.startswith(OPEN_FOLDER):
            return ""
        shown = header(scope, b"authorization")
        name = self.keys.name_of(shown.decode("latin-1")) if shown else None
        # a browser asks first whether it may send the key
        if name is None and scope["method"] != "OPTIONS":
            said = "unknown key" if shown else "no key"
            raise Failure(
                401,
                f"{said}; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return name or ""


def _check_head(scope: Scope) -> None:
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > _MOST_HEAD:
        raise head_too_large()


class _Visit:
    """A request, as the log has it: no text of prompts."""

    def __init__(self, scope: Scope) -> None:
        given = header(scope, b"x-request-id")
        # what a client wrote goes into a log: only plain ids do
        self.number = given.decode() if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        self.scope, self.status, self.began = scope, 0, time.perf_counter()

    def sending(self, send: Send) -> Send:
        """`send`, with the id as a header."""

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", self.number.encode()),
                ]
            await send(message)

        return with_id

    def log(self) -> None:
        """One line about it."""
        facts: dict[str, Any] = {
            "request_id": self.number,
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status,
            "seconds": round(time.perf_counter() - self.began, 4),
            "tenant": self.scope.get("state", {}).get("tenant", ""),
        }
        _log.info("request", extra={"facts": facts})
