"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from linspec.decoding.accepted import TokenLogprob
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.engine.results import Generation, Piece
from linspec.llm import LLM
from linspec.serve.answering import Answer, answered, output_tokens
from linspec.serve.constraints import Tooled, constrained
from linspec.serve.failures import RESPONSES, Failure, json_response
from linspec.serve.schemas.chat import ChatCompletion, ChatRequest
from linspec.serve.served import Served, Serving
from linspec.serve.shapes import RunningUsage, chat_logprobs, drafts_of, in_order, new_id, usage_of
from linspec.serve.token_bytes import TokenBytes
from linspec.serve.tool_calls import ToolTurn

router = APIRouter(responses=RESPONSES)


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}},
)
async def chat(asked: ChatRequest, http: HttpRequest, served: Serving) -> Any:
    """Write the next turn of a conversation."""
    name, worker = served.worker(asked.model)
    form = _Form.of(asked, served, name, worker.llm)
    answer = await answered(served, http, worker, form.requests, show_drafts=asked.with_drafts)
    if asked.stream:
        return answer.streamed(_chunks(answer, form))
    return json_response(form.whole(await answer.whole()))


@dataclass(frozen=True)
class _Form:
    """How an answer is written."""

    asked: ChatRequest
    params: SamplingParams
    tooled: Tooled
    name: str
    llm: LLM
    id: str
    created: int

    @classmethod
    def of(cls, asked: ChatRequest, served: Served, name: str, llm: LLM) -> _Form:
        """Raises Failure or ConfigError for what does not go together."""
        if asked.chat_template is not None:
            message = (
                "chat_template is a program, which this server takes from nobody; leave it out"
            )
            raise Failure(400, message, code="unsupported_parameter", param="chat_template")
        tooled = Tooled.of(asked.tools, asked.tool_choice, several=asked.parallel_tool_calls)
        if asked.top_logprobs is not None and not asked.logprobs:
            message = "top_logprobs needs logprobs: true"
            raise Failure(400, message, param="top_logprobs")
        most = asked.max_completion_tokens or asked.max_tokens
        params = asked.to_params(
            served.settings.temperature,
            max_tokens=output_tokens(served.settings, most),
            logprobs=asked.top_logprobs or 0 if asked.logprobs else None,
            **constrained(asked),
        )
        return cls(asked, params, tooled, name, llm, new_id("chatcmpl-"), int(time.time()))

    def logprobs(self, found: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Log-probabilities of tokens; None where nobody asked."""
        return None if found is None else chat_logprobs(self._words, found)

    @cached_property
    def _words(self) -> TokenBytes:
        # reads the whole list of added tokens, which can be thousands
        return TokenBytes(self.llm.tokenizer)

    def requests(self, llm: LLM) -> list[Request]:
        """As the engine takes them; also renders the template."""
        messages = [each.to_template() for each in self.asked.messages]
        return [self.tooled.request(llm, messages, self.params)]

    def whole(self, outputs: Sequence[Sequence[Generation]]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(index, each) for index, each in enumerate(outputs[0])]
        return {
            **self.head("chat.completion"),
            "choices": choices,
            "usage": usage_of(outputs).model_dump(),
        }

    def head(self, kind: str) -> dict[str, Any]:
        """What every part of an answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _choice(self, index: int, output: Generation) -> dict[str, Any]:
        message, reason = self.tooled.turn().message(output.text, output.finish_reason)
        return {
            "index": index,
            "message": message,
            "finish_reason": reason,
            "logprobs": self.logprobs(output.logprobs),
        }

    def deltas(self, turn: ToolTurn, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        """The parts of a choice that a piece makes."""
        index, reason = piece.sequence, None
        parts = turn.push(piece.text)
        if piece.done is not None:
            last, reason = turn.finish(piece.done.finish_reason)
            parts += last
        logprobs = self.logprobs(piece.logprobs)
        if first:
            yield _delta(index, {"role": "assistant", "content": ""})
        drafts = drafts_of(piece, self.llm.tokenizer)
        if not parts and (piece.logprobs or drafts):
            parts = [{}]
        for at, part in enumerate(parts):
            more = {**drafts, "logprobs": logprobs} if at == 0 else {}
            yield _delta(index, part, **more)
        if reason is not None:
            yield _delta(index, {}, reason=reason)


def _delta(
    index: int,
    delta: dict[str, Any],
    *,
    reason: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **more}


async def _chunks(answer: Answer, form: _Form) -> AsyncIterator[dict[str, Any]]:
    head = form.head("chat.completion.chunk")
    running = RunningUsage(form.asked.stream_options, answer.job.requests)
    turns: defaultdict[int, ToolTurn] = defaultdict(form.tooled.turn)
    ended: dict[int, Generation] = {}
    async for piece in answer.pieces():
        first = piece.sequence not in turns
        more = running.take(piece)
        for choice in form.deltas(turns[piece.sequence], piece, first):
            yield {**head, "choices": [choice], **more}
        if piece.done is not None:
            ended[piece.sequence] = piece.done
    if form.asked.with_usage:
        yield {**head, "choices": [], "usage": usage_of(in_order([ended])).model_dump()}
