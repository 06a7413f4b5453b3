"""What all requests share: strict types, no unknown fields, and how the next token is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, model_validator

from linspec.decoding.sampling import SamplingParams

# a bias from here on bans a token, as OpenAI's API has it
_BAN = -100.0
# a mapping is checked in parts of so many entries
_PART = 64
# how deep JSON of no declared form may be nested
_DEEPEST = 100
# most turns, words and tools of a request: each costs the server more than its bytes
_MOST = 4096


def _in_parts(given: Any, check: Callable[[Any], dict[Any, Any]]) -> dict[Any, Any]:
    """Check a mapping until a part of it is wrong: as `fail_fast`, which is for lists."""
    if not isinstance(given, dict) or len(given) <= _PART:
        return check(given)
    entries = list(given.items())
    found: dict[Any, Any] = {}
    for at in range(0, len(entries), _PART):
        found |= check(dict(entries[at : at + _PART]))
    return found


# An answer tells of one error. All that eight megabytes can have take minutes and gigabytes to write down.
Id = Annotated[int, Field(ge=0, lt=2**31)]
K = TypeVar("K")
T = TypeVar("T")
Several = Annotated[list[T], Field(fail_fast=True, max_length=_MOST)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Mapped = Annotated[dict[K, T], WrapValidator(_in_parts)]
Text = Annotated[str, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """JSON of no declared form, which is written again somewhere: no NaN, and not too deep for that."""
    layer: list[Any] = [given]
    for _ in range(_DEEPEST):
        if any(isinstance(each, float) and not math.isfinite(each) for each in layer):
            raise ValueError("has a number that JSON has no form for")
        layer = [
            inner
            for each in layer
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not layer:
            return given
    raise ValueError(f"is nested more than {_DEEPEST} deep")


Free = Annotated[dict[str, Any], AfterValidator(_plain)]


class Asked(BaseModel):
    """A request's body: what is unknown or of the wrong type is refused, never ignored or converted."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        """Of unknown fields the first one: see `Several`."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        known = {name: each for name, each in given.items() if name in cls.model_fields}
        unknown = next(name for name in given if name not in cls.model_fields)
        return known | {unknown: given[unknown]}


class Given(BaseModel):
    """An answer's body."""


# fields of vLLM's API that say what the output has to look like
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")


class StreamOptions(Asked):
    """What a stream has beside the text."""

    include_usage: bool = Field(False, description="A last chunk with the usage of all choices.")
    continuous_usage_stats: bool = Field(
        False, description="In every chunk the tokens so far, of all choices."
    )
    include_drafts: bool = Field(
        False, description="An object `linspec` in each choice: which text drafters wrote."
    )
    include_obfuscation: bool = Field(False, description="Taken and ignored.")


class Labels(Asked):
    """Fields of OpenAI's API that describe a request and change nothing here."""

    user: str | None = None
    metadata: Mapped[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Constraints(Asked):
    """What the output has to look like; see `serve.constraints`."""

    response_format: Free | None = Field(
        default=None, description="text, json_object or json_schema; also regex and grammar."
    )
    guided_json: Free | Text | None = Field(default=None, description="A JSON schema.")
    guided_regex: Text | None = None
    guided_choice: Several[Text] | None = None
    guided_grammar: Text | None = Field(default=None, description="Lark's form, or GBNF.")
    structured_outputs: Free | None = Field(
        default=None, description="One of json, regex, choice and grammar."
    )


class Sampling(Asked):
    """How the next token is chosen, and when the output ends."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Mapped[TokenId, Bias] | None = Field(None, description="-100 bans a token.")
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Text | Annotated[Several[Text], Field(max_length=64)] | None = None
    stop_token_ids: Several[Id] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    bad_words: Several[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def with_drafts(self) -> bool:
        """Whether a stream tells which drafters wrote it."""
        return self.stream_options is not None and self.stream_options.include_drafts

    def to_params(self, temperature: float, **more: Any) -> SamplingParams:
        """As the engine takes it; `temperature` is that of a request without one.

        Raises ConfigError for combinations that break a rule.
        """
        named = {
            name: getattr(self, name)
            for name in (
                *("top_p", "min_p", "presence_penalty", "frequency_penalty"),
                *("repetition_penalty", "n", "stop", "stop_token_ids", "min_tokens", "bad_words"),
                *("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"),
            )
            if getattr(self, name) is not None
        }
        bias = {
            int(token): -math.inf if each <= _BAN else each
            for token, each in (self.logit_bias or {}).items()
        }
        return SamplingParams(
            temperature=temperature if self.temperature is None else self.temperature,
            # -1 is how some clients say 0
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed % 2**64,
            logit_bias=bias,
            **(named | more),
        )


class CachedTokens(Given):
    """Of the tokens of a prompt."""

    cached_tokens: int = Field(description="Read from the prefix cache.")


class Speculation(Given):
    """What drafts brought."""

    tokens_per_round: float = Field(description="1.0 is plain decoding.")
    rounds: int
    drafted: int
    accepted: int


class Usage(Given):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    linspec: Speculation


class ErrorBody(Given):
    """An error as OpenAI's API has it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Given):
    """The body of every answer that is no success."""

    error: ErrorBody
