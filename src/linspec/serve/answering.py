"""From a request to the pieces of its answer: queued, read, and dropped when its client leaves.

Whatever can go wrong before the first token goes wrong before an answer begins, so it has its status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from linspec.decoding.request import Request
from linspec.engine.results import Generation, Piece
from linspec.errors import ContextOverflow
from linspec.llm import LLM
from linspec.serve.failures import Failure, failure_of, json_text
from linspec.serve.served import Served
from linspec.serve.settings import Settings
from linspec.serve.shapes import in_order
from linspec.serve.worker import Job, Worker

T = TypeVar("T")
_log = logging.getLogger("linspec.serve")


class Answer:
    """The job of one HTTP request, with its first piece there; `id` is what the answer is called."""

    def __init__(self, http: HttpRequest, job: Job, first: Piece, until: float) -> None:
        self.http, self.job, self._first, self._until = http, job, first, until

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces; raises what broke a sequence, and Failure 504 when the time is over."""
        try:
            piece: Piece | None = self._first
            while piece is not None:
                yield _sound(piece)
                # a limit around the loop would end whoever reads the pieces
                async with _time_limit(self._until):
                    piece = await anext(self.job, None)
        finally:
            self.job.cancel()

    async def whole(self) -> list[list[Generation]]:
        """The outputs of each request, when all are there."""
        try:
            return await _unless_gone(self.http, self._outputs())
        finally:
            self.job.cancel()

    async def _outputs(self) -> list[list[Generation]]:
        found: list[dict[int, Generation]] = [{} for _ in self.job.requests]
        async for piece in self.pieces():
            if piece.done is not None:
                found[piece.index][piece.sequence] = piece.done
        return in_order(found)

    def streamed(self, events: AsyncIterator[Any], *, named: bool = False) -> EventSourceResponse:
        """Server-sent events of JSON; `named` ones carry their type, others end with [DONE]."""
        return _Stream(_lines(events, named), self.job)


class _Stream(EventSourceResponse):
    """Events of a job, which ends with the stream, however that ends."""

    def __init__(self, lines: AsyncIterator[dict[str, str]], job: Job) -> None:
        super().__init__(lines, sep="\n")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def answered(
    served: Served,
    http: HttpRequest,
    worker: Worker,
    asked: Callable[[LLM], Sequence[Request]],
    *,
    show_drafts: bool = False,
) -> Answer:
    """Queue what `asked` makes, and wait for the first piece; raises Failure, or what is wrong with it."""
    submit = partial(_submitted, served.settings, http, worker, asked, show_drafts)
    job: Job = await run_in_threadpool(submit)
    until = asyncio.get_running_loop().time() + served.settings.request_seconds
    try:
        async with _time_limit(until):
            first = await _unless_gone(http, anext(job))
        return Answer(http, job, _sound(first), until)
    except BaseException:
        job.cancel()
        raise


def _submitted(
    settings: Settings,
    http: HttpRequest,
    worker: Worker,
    asked: Callable[[LLM], Sequence[Request]],
    show_drafts: bool,
) -> Job:
    """In a thread of its own: texts of a megabyte take their time to become tokens."""
    requests = asked(worker.llm)
    for at, request in enumerate(requests):
        _check(settings, at, request)
        if settings.log_prompts:
            text = worker.llm.tokenizer.decode(request.prompt)
            facts = {"request_id": http.state.request_id, "prompt": text}
            _log.info("prompt", extra={"facts": facts})
    return worker.submit(
        requests,
        tenant=http.state.tenant,
        name=http.state.request_id,
        trace=http.headers.get("traceparent", ""),
        show_drafts=show_drafts,
    )


def _check(settings: Settings, at: int, request: Request) -> None:
    most, size = settings.max_prompt_tokens, len(request.prompt)
    if most is not None and size > most:
        raise ContextOverflow(
            f"prompt {at} has {size} tokens, this server takes {most}; shorten it, or raise "
            "--max-prompt-tokens"
        )


def output_tokens(settings: Settings, given: int | None, usual: int | None = None) -> int:
    """How many tokens an output may have; raises Failure 400 for more than the server allows."""
    if given is None:
        return settings.max_tokens if usual is None else min(usual, settings.max_tokens)
    if given > settings.max_tokens:
        raise Failure(
            400,
            f"the request asks for {given} output tokens, this server allows {settings.max_tokens}; ask for "
            "fewer, or raise --max-tokens",
            code="invalid_value",
            param="max_tokens",
        )
    return given


def _sound(piece: Piece) -> Piece:
    """A piece of no failed sequence; raises what failed it."""
    if piece.done is not None and piece.done.error is not None:
        raise piece.done.error
    return piece


class _time_limit:  # noqa: N801  # reads like a function
    """asyncio.timeout_at, whose end is a 504."""

    def __init__(self, until: float) -> None:
        self._limit = asyncio.timeout_at(until)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._limit.__aexit__(*error)
        except TimeoutError:
            raise Failure(
                504,
                "the request took longer than this server allows; ask for fewer tokens, or raise "
                "--request-seconds",
                code="timeout",
            ) from None


async def _unless_gone(http: HttpRequest, wanted: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """What is `wanted`, unless the client leaves first."""
    getting = asyncio.ensure_future(wanted)
    leaving = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({getting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        raise Failure(499, "the client has left", code="client_left")
    finally:
        for each in (getting, leaving):
            each.cancel()
        await asyncio.gather(getting, leaving, return_exceptions=True)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _lines(events: AsyncIterator[Any], named: bool) -> AsyncIterator[dict[str, str]]:
    """Events as sse-starlette takes them; an error is the last one."""
    try:
        async for event in events:
            line = {"data": json_text(event)}
            yield line | {"event": event["type"]} if named else line
    except Exception as error:
        failure = failure_of(error)
        if named:
            yield {"event": "error", "data": json_text(failure.event())}
        else:
            yield {"data": json_text(failure.body())}
    if not named:
        yield {"data": "[DONE]"}
