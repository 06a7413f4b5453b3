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
from linspec.serve.constraints import check_tools, constrained
from linspec.serve.failures import RESPONSES, json_response
from linspec.serve.schemas.base import Constraints
from linspec.serve.schemas.responses import (
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputMessage,
    OutputText,
    ResponseAnswer,
    ResponseRequest,
    ResponseUsage,
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
    outputs = await answer.whole()
    return json_response(form.answer(outputs[0][0]).model_dump())


@dataclass(frozen=True)
class _Form:
    """How an answer is written."""

    asked: ResponseRequest
    params: SamplingParams
    name: str
    id: str
    item: str
    created: int

    @classmethod
    def of(cls, asked: ResponseRequest, served: Served, name: str) -> _Form:
        """Raises Failure for what is not served."""
        check_tools(asked.tools, asked.tool_choice)
        form = None if asked.text is None else asked.text.format
        params = SamplingParams(
            temperature=served.settings.temperature
            if asked.temperature is None
            else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_tokens=output_tokens(served.settings, asked.max_output_tokens),
            **constrained(Constraints(response_format=form)),
        )
        return cls(asked, params, name, new_id("resp_"), new_id("msg_"), int(time.time()))

    def requests(self, llm: LLM) -> list[Request]:
        """As the engine takes them; also renders the template."""
        asked = self.asked
        messages = [] if asked.instructions is None else [("system", asked.instructions)]
        turns = [{"role": role, "content": text} for role, text in messages]
        if isinstance(asked.input, str):
            turns.append({"role": "user", "content": asked.input})
        else:
            turns += [each.to_template() for each in asked.input]
        return [llm.request(llm.encoder.chat(turns), self.params)]

    def message(self, text: str, status: Any) -> OutputMessage:
        """The turn that is written."""
        return OutputMessage(id=self.item, status=status, content=[OutputText(text=text)])

    def answer(self, done: Generation | None = None) -> ResponseAnswer:
        """The whole answer, or what stands before it."""
        cut = done is not None and done.finish_reason == "length"
        status: Any = "in_progress" if done is None else "incomplete" if cut else "completed"
        return ResponseAnswer(
            id=self.id,
            created_at=self.created,
            status=status,
            model=self.name,
            output=[] if done is None else [self.message(done.text, status)],
            usage=None if done is None else _usage(done),
            incomplete_details=Incomplete(reason="max_output_tokens") if cut else None,
            instructions=self.asked.instructions,
            max_output_tokens=self.asked.max_output_tokens,
            metadata=self.asked.metadata or {},
            temperature=self.params.temperature,
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

    place = {"item_id": form.item, "output_index": 0, "content_index": 0}
    begun = form.answer().model_dump()
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    empty = form.message("", "in_progress").model_dump() | {"content": []}
    yield event("output_item.added", output_index=0, item=empty)
    yield event("content_part.added", **place, part=OutputText(text="").model_dump())
    done: Generation | None = None
    async for piece in answer.pieces():
        if piece.text:
            yield event("output_text.delta", **place, delta=piece.text, logprobs=[])
        done = piece.done or done
    assert done is not None, "the last piece has it, or pieces() raises"
    whole = form.answer(done)
    yield event("output_text.done", **place, text=done.text, logprobs=[])
    yield event("content_part.done", **place, part=OutputText(text=done.text).model_dump())
    yield event("output_item.done", output_index=0, item=whole.output[0].model_dump())
    yield event(whole.status, response=whole.model_dump())
