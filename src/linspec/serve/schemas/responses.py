"""/v1/responses: OpenAI's newer form of a conversation, for text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from linspec.serve.schemas.base import Asked, Given, Labels, Several, Speculation


class InputPart(Asked):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Several[dict[str, Any]] | None = None
    logprobs: Several[dict[str, Any]] | None = None


class InputMessage(Asked):
    """One turn of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Several[InputPart]
    id: str | None = None
    status: str | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(Asked):
    """How the text is to look."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseRequest(Labels):
    """What a model answers to."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    input: (
        Annotated[str, Field(min_length=1)] | Annotated[Several[InputMessage], Field(min_length=1)]
    )
    instructions: str | None = Field(None, description="A first message of the system.")
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: TextFormat | None = None
    tools: Several[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = Field(None, description="Nothing is stored: send the turns.")
    background: Literal[False] | None = None


class OutputText(Given):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[dict[str, Any]] = Field(default=[])
    logprobs: list[dict[str, Any]] = Field(default=[])


class OutputMessage(Given):
    """The turn that was written."""

    type: Literal["message"] = "message"
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputDetails(Given):
    """Of the tokens of a prompt."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Given):
    """Of the tokens of an output."""

    reasoning_tokens: int = 0


class ResponseUsage(Given):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    linspec: Speculation


class Incomplete(Given):
    """Why an answer is no whole one."""

    reason: Literal["max_output_tokens"]


class ResponseAnswer(Given):
    """An answer, or what there is of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float | None = None
    text: dict[str, Any] = Field(default={"format": {"type": "text"}})
    tool_choice: str = "none"
    tools: list[dict[str, Any]] = Field(default=[])
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
