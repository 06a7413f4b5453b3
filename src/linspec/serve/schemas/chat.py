"""/v1/chat/completions: conversations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from linspec.serve.schemas.base import (
    Asked,
    Constraints,
    Free,
    Given,
    Labels,
    Sampling,
    Several,
    Usage,
)

MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]


class TextPart(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Asked):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Several[TextPart] | None = None
    name: str | None = None
    tool_calls: Several[Free] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("needs content: only a turn of the assistant's goes without")
        return self

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        # templates know no developers
        role = "system" if self.role == "developer" else self.role
        more = {
            name: getattr(self, name)
            for name in ("name", "tool_calls", "tool_call_id")
            if getattr(self, name) is not None
        }
        return {"role": role, "content": content or "", **more}


class ChatRequest(Sampling, Labels, Constraints):
    """A conversation whose next turn the model writes."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    messages: Annotated[Several[Message], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = Field(None, description="The old name.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Several[Free] | None = None
    tool_choice: str | Free | None = None
    parallel_tool_calls: bool | None = None
    modalities: Several[Literal["text"]] | None = None
    chat_template: str | None = Field(None, description="Not served: templates are programs.")


class TokenText(Given):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TokenText):
    """... and the likeliest ones in its place."""

    top_logprobs: list[TokenText]


class ChatLogprobs(Given):
    """Log-probabilities, token by token."""

    content: list[ChatToken]
    refusal: None = None


class ChatChoice(Given):
    """One answer."""

    index: int
    message: dict[str, Any]
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None


class ChatCompletion(Given):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
