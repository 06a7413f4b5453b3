"""/v1/responses: OpenAI's newer form of a conversation, for text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from linspec.serve.schemas.base import Asked, Free, Given, Labels, Several, Speculation


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
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text(self.content)}


class FunctionCall(Asked):
    """A call of a tool that an earlier answer had."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it: a turn of the assistant's."""
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}


class FunctionCallOutput(Asked):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Several[InputPart]
    id: str | None = None
    status: str | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)}


def _text(content: str | Iterable[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


_KINDS = ("message", "function_call", "function_call_output")


def _kind(given: Any) -> str | None:
    """Which form an input has: a message need not say that it is one."""
    if not isinstance(given, Mapping):
        return None
    kind = given.get("type", "message")
    return f"a {kind}" if isinstance(kind, str) and kind in _KINDS else None


# the space keeps a tag out of the place that an error names
InputItem = Annotated[
    Annotated[InputMessage, Tag("a message")]
    | Annotated[FunctionCall, Tag("a function_call")]
    | Annotated[FunctionCallOutput, Tag("a function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="input_item",
        custom_error_message=f"an input is an object whose type is one of {', '.join(_KINDS)}",
    ),
]


def as_turns(items: Iterable[InputMessage | FunctionCall | FunctionCallOutput]) -> list[Any]:
    """The turns of a conversation: what the assistant says and calls in a row is one."""
    turns: list[dict[str, Any]] = []
    for turn in (each.to_template() for each in items):
        if "tool_calls" in turn and turns and turns[-1]["role"] == "assistant":
            turns[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
        else:
            turns.append(turn)
    return turns


def _truly(given: Any) -> Any:
    """0 is equal to False, and no boolean."""
    if not isinstance(given, bool):
        raise ValueError("is no boolean")
    return given


class TextFormat(Asked):
    """How the text is to look."""

    format: Free | None = None
    verbosity: str | None = None


class ResponseRequest(Labels):
    """What a model answers to."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    input: Annotated[str, Field(min_length=1)] | Annotated[Several[InputItem], Field(min_length=1)]
    instructions: str | None = Field(None, description="A first message of the system.")
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: TextFormat | None = None
    tools: Several[Free] | None = None
    tool_choice: str | Free | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = Field(None, description="Nothing is stored: send the turns.")
    background: Annotated[Literal[False], BeforeValidator(_truly)] | None = None


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


class OutputCall(Given):
    """A call of a tool, for the caller to run."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


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
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    temperature: float | None = None
    text: dict[str, Any] = Field(default={"format": {"type": "text"}})
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = Field(default=[])
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
