"""The smaller endpoints: embeddings, models, tokens, health."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from linspec.serve.schemas.base import Asked, Given, Ids, Labels, Several
from linspec.serve.schemas.chat import Message
from linspec.serve.schemas.completions import Tokens


class EmbeddingRequest(Labels):
    """Texts, or token ids of one or several."""

    model: str | None = Field(None, description="May be left out where one encoder is served.")
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            Several[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2048)
        ]
        | Tokens
        | Annotated[Several[Tokens], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Only that of the model."
    )


class Embedding(Given):
    """One vector of length 1; as a list of numbers, or as base64 of float32 numbers."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Given):
    """Tokens of the input."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Given):
    """All vectors."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(Given):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "linspec"
    max_model_len: int | None
    kind: Literal["text", "embeddings"]


class ModelList(Given):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Asked):
    """A text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = Field(None, description="Give this or messages.")
    messages: Annotated[Several[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class TokenList(Given):
    """Tokens of a text."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeRequest(Asked):
    """Token ids."""

    model: str | None = None
    tokens: Ids


class DetokenizedText(Given):
    """Their text."""

    prompt: str


class Health(Given):
    """Whether it works; ready: whether requests are taken."""

    status: Literal["ok", "failing", "starting or stopping"]


class Version(Given):
    """Which linspec it is."""

    version: str
