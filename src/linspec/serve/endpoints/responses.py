"""/v1/responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.engine.results import Generation
from linspec.llm import LLM
from linspec.serve.answering import Answer, answered, output_tokens
from linspec.serve.constraints import Tooled, constrained
from linspec.serve.failures import RESPONSES, json_response
from linspec.serve.response_items import Items
from linspec.serve.schemas.base import Constraints
from linspec.serve.schemas.responses import (
    Incomplete,
    InputDetails,
    OutputDetails,
    ResponseAnswer,
    ResponseRequest,
    ResponseUsage,
    as_turns,
)
from linspec.serve.served import Served, Serving
from linspec.serve.shapes import new_id, usage_of

router = APIRouter(responses=RESPONSES)


@router.post(
    "/v1/responses",
    responses={200: {"model": ResponseAnswer, "content": {"text/event-stream": {}}}},
)
async def responses(asked: ResponseRequest, http: HttpRequest, served: Serving) -> Any:
    """Answer a text or a conversation; nothing is stored."""
    name, worker = served.worker(asked.model)
    form = _Form.of(asked, served, name)
    answer = await answered(served, http, worker, form.requests)
    if asked.stream:
        return answer.streamed(_events(answer, form), named=True)
    ((output,),) = await answer.whole()
    items = form.items()
    items.push(output.text)
    items.finish(output.finish_reason)
    return json_response(form.answer(output, items).model_dump())


@dataclass(frozen=True)
class _Form:
    """How an answer is written."""

    asked: ResponseRequest
    params: SamplingParams
    tooled: Tooled
    name: str
    id: str
    created: int

    @classmethod
    def of(cls, asked: ResponseRequest, served: Served, name: str) -> _Form:
        """Raises Failure or ConfigError for what does not go together."""
        tooled = Tooled.of(asked.tools, asked.tool_choice, several=asked.parallel_tool_calls)
        form = None if asked.text is None else asked.text.format
        params = SamplingParams(
            temperature=served.settings.temperature
            if asked.temperature is None
            else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_tokens=output_tokens(served.settings, asked.max_output_tokens),
            **constrained(Constraints(response_format=form)),
        )
        return cls(asked, params, tooled, name, new_id("resp_"), int(time.time()))

    def requests(self, llm: LLM) -> list[Request]:
        """As the engine takes them; also renders the template."""
        asked = self.asked
        told = [] if asked.instructions is None else [asked.instructions]
        turns: list[Any] = [{"role": "system", "content": text} for text in told]
        if isinstance(asked.input, str):
            turns.append({"role": "user", "content": asked.input})
        else:
            turns += as_turns(asked.input)
        return [self.tooled.request(llm, turns, self.params)]

    def items(self) -> Items:
        """What the answer is made of, as it comes."""
        return Items(self.tooled.turn())

    def answer(self, done: Generation | None = None, items: Items | None = None) -> ResponseAnswer:
        """The whole answer, or what stands before it."""
        asked = self.asked
        cut = done is not None and done.finish_reason == "length"
        status: Any = "in_progress" if done is None else "incomplete" if cut else "completed"
        return ResponseAnswer(
            id=self.id,
            created_at=self.created,
            status=status,
            model=self.name,
            output=[] if items is None else items.output,
            usage=None if done is None else _usage(done),
            incomplete_details=Incomplete(reason="max_output_tokens") if cut else None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            temperature=self.params.temperature,
            tool_choice=asked.tool_choice or "auto",
            tools=asked.tools or [],
            top_p=self.params.top_p,
        )


def _usage(done: Generation) -> ResponseUsage:
    found = usage_of([[done]])
    return ResponseUsage(
        input_tokens=found.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=found.prompt_tokens_details.cached_tokens),
        output_tokens=found.completion_tokens,
        output_tokens_details=OutputDetails(),
        total_tokens=found.total_tokens,
        linspec=found.linspec,
    )


async def _events(answer: Answer, form: _Form) -> AsyncIterator[dict[str, Any]]:
    numbers = itertools.count()

    def event(kind: str, **more: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "sequence_number": next(numbers), **more}

    begun = form.answer().model_dump()
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    items = form.items()
    done: Generation | None = None
    async for piece in answer.pieces():
        for kind, more in items.push(piece.text):
            yield event(kind, **more)
        done = piece.done or done
    assert done is not None, "the last piece has it, or pieces() raises"
    for kind, more in items.finish(done.finish_reason):
        yield event(kind, **more)
    whole = form.answer(done, items)
    yield event(whole.status, response=whole.model_dump())
