"""The body of a request, which is refused as soon as it is too large, has too much in it, or takes too long.

Bytes alone bound nothing: eight megabytes of `[],` hold the event loop for seconds while they are read.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Receive, Scope

from linspec.serve.failures import Failure

# entries of lists and objects in a body: as many token ids may be in a prompt
MOST_VALUES = 2**18
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


class Body:
    """What `receive` brings, within limits.

    most: bytes. seconds: from here to the end of the body.
    """

    def __init__(self, scope: Scope, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._most, self._seconds = receive, most, seconds
        self._until = asyncio.get_running_loop().time() + seconds
        self._seen, self._more, self._values = 0, True, Values()
        told = header(scope, b"content-length")
        if told and header(scope, b"transfer-encoding"):
            raise _two_lengths()
        if told.isdigit() and (len(told) > 18 or int(told) > most):
            self._refuse_size(told.decode()[:20])

    async def receive(self) -> Message:
        """The next part."""
        # behind the body, an app waits for its client to leave
        if not self._more:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise too_slow(self._seconds) from None
        if message["type"] == "http.request":
            self._more = message.get("more_body", False)
            self._check(message.get("body", b""))
        return message

    def _check(self, part: bytes) -> None:
        self._seen += len(part)
        if self._seen > self._most:
            self._refuse_size(f"more than {self._most}")
        if b"\0" in part:
            # also what UTF-16 is full of
            message = "the body has a zero byte, so it is no JSON in UTF-8; send it in UTF-8"
            raise Failure(400, message, code="invalid_json")
        if self._values.push(part) > MOST_VALUES:
            raise Failure(
                413,
                f"the body has more than {MOST_VALUES} values (token ids, entries of lists and objects); "
                "send fewer at once, or texts in the place of ids",
                code="body_too_large",
            )

    def _refuse_size(self, size: str) -> None:
        raise Failure(
            413,
            f"the body has {size} bytes, this server takes {self._most}; send less, or raise "
            "--max-body-bytes",
            code="body_too_large",
        )


class Values:
    """Counts what lists and objects of a JSON text have in them, while it comes."""

    def __init__(self) -> None:
        self.count = 0
        self._held, self._quoted = b"", False

    def push(self, part: bytes) -> int:
        """How many there are up to here; brackets count too."""
        part = _ESCAPED.sub(b"", self._held + part)
        self._held = b"\\" if part.endswith(b"\\") else b""
        texts = part.removesuffix(b"\\").split(b'"')
        plain = b" ".join(texts[self._quoted :: 2])
        self._quoted ^= len(texts) % 2 == 0
        self.count += sum(plain.count(each) for each in (b",", b"[", b"{"))
        return self.count


def too_slow(seconds: float) -> Failure:
    """What a client is told whose request does not come."""
    return Failure(
        408,
        f"the request was not complete within {seconds:g} seconds; send it faster, or raise --body-seconds",
        code="body_timeout",
        headers={"connection": "close"},
    )


def _two_lengths() -> Failure:
    """A proxy that goes by the other one would take the rest for the request of someone else."""
    message = "the request has both Content-Length and Transfer-Encoding; send one of them"
    return Failure(400, message, code="invalid_http", headers={"connection": "close"})


def header(scope: Mapping[str, Any], name: bytes) -> bytes:
    """The first header of that name, b"" without one."""
    return next((value for key, value in scope["headers"] if key == name), b"")
