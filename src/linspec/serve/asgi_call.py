"""Asking an ASGI app of this process, message by message.

async for message in called(app, asked): ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message

from linspec.serve.fleet import Asked

# messages that wait for a slow reader; then the app waits
_AHEAD = 16


async def called(app: ASGIApp, asked: Asked) -> AsyncGenerator[Message, None]:
    """What `app` answers; closing the generator tells the app that its client has left."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": asked.method,
        "path": asked.path,
        "raw_path": asked.path.encode("utf-8", "surrogateescape"),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "client": None,
        "server": None,
        "state": {"tenant": asked.tenant},
    }
    answers: asyncio.Queue[Message | None] = asyncio.Queue(_AHEAD)
    left = asyncio.Event()
    unread = [{"type": "http.request", "body": asked.body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, answers.put)
        finally:
            # nobody reads on behind a client that has left
            if not left.is_set():
                await answers.put(None)

    running = asyncio.ensure_future(run())
    try:
        while (message := await answers.get()) is not None:
            yield message
        await running
    finally:
        left.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
