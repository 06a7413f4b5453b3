"""uvicorn's connection with limits that it has not: for the head of a request, and for who reads no answer.

uvicorn.Config(app, http=limited(head_seconds=60, answer_seconds=600))
"""

from __future__ import annotations

import asyncio
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from linspec.serve.body import too_slow
from linspec.serve.failures import Failure, head_too_large, json_bytes


def limited(*, head_seconds: float, answer_seconds: float) -> type[asyncio.Protocol]:
    """A class of connections that end where a head takes longer, or what was written is not read."""
    limits = {"head_seconds": head_seconds, "answer_seconds": answer_seconds}
    return type("LimitedConnection", (Connection,), limits)


class Connection(H11Protocol):
    """A connection; see `limited`."""

    head_seconds: float
    answer_seconds: float
    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; its request must follow."""
        super().connection_made(transport)
        # writing is paused whenever something is unread, not from 64 KiB on; with 0 that of TLS never goes on
        transport.set_write_buffer_limits(high=1)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to watch."""
        super().connection_lost(exc)
        self._head = _without(self._head)
        self._unread = _without(self._unread)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        """The client does not read at the moment."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has all that was written."""
        super().resume_writing()
        self._unread = _without(self._unread)

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a request that is no HTTP; uvicorn calls it in its `except`."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            self._refuse(head_too_large())
            return
        message = "this is no valid HTTP request; send HTTP/1.1"
        self._refuse(Failure(status, message, code="invalid_http"))

    def _watch_head(self) -> None:
        """Start the clock where the next head has to come, stop it where a request is answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _without(self._head)
        elif self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.head_seconds, self._end)

    def _end(self) -> None:
        if self.transport.is_closing():
            return
        begun = self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if begun:
            self._refuse(too_slow(self.head_seconds))
        else:
            self.transport.close()

    def _refuse(self, failure: Failure) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # an answer has begun: it can only end
            self.transport.abort()
            return
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        response = h11.Response(status_code=failure.status, headers=headers)
        data = h11.Data(data=json_bytes(failure.body()))
        for event in (response, data, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _without(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer: this one is cancelled."""
    if timer is not None:
        timer.cancel()
    return None
