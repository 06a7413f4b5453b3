"""/v1/completions: texts that go on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from linspec.serve.schemas.base import (
    Constraints,
    Given,
    Ids,
    Labels,
    Sampling,
    Several,
    Text,
    Usage,
)

Tokens = Annotated[Ids, Field(min_length=1)]


class CompletionRequest(Sampling, Labels, Constraints):
    """A text to continue, or several; as text or token ids."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    prompt: (
        Text
        | Annotated[Several[Text], Field(min_length=1, max_length=1024)]
        | Tokens
        | Annotated[Several[Tokens], Field(min_length=1, max_length=1024)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="16 if it is left out; 0 only with echo."
    )
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(
        None, description="Write so many and return the n likeliest."
    )
    echo: bool | None = Field(None, description="Put the prompt before the output.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: None = Field(None, description="Not served.")


class TextLogprobs(Given):
    """Log-probabilities, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Given):
    """One output."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None


class Completion(Given):
    """All outputs."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


def as_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request, one or several."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
