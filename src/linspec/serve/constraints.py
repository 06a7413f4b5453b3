"""What an output has to look like: formats, grammars and tools. None is served yet, and each says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linspec.serve.failures import Failure
from linspec.serve.schemas.base import Constraints


def constrained(asked: Constraints) -> dict[str, Any]:
    """Settings of SamplingParams for what `asked` wants of its output; raises Failure 400."""
    form = asked.response_format
    if form is not None and form.get("type") != "text":
        raise _unserved("response_format")
    for name in ("guided_regex", "guided_grammar"):
        if getattr(asked, name) is not None:
            raise _unserved(name)
    return {}


def check_tools(tools: list[dict[str, Any]] | None, choice: Any) -> None:
    """Raise Failure 400 where a request has tools."""
    if tools and choice != "none":
        raise _unserved("tools")


def _unserved(name: str) -> Failure:
    return Failure(
        400,
        f"{name} is not served here; leave it out",
        code="unsupported_parameter",
        param=name,
    )


@dataclass
class Turn:
    """An answer of a chat model, on its way from text to the parts of a message."""

    def push(self, text: str) -> list[dict[str, Any]]:
        """Deltas of the message for new text."""
        return [{"content": text}] if text else []

    def finish(self, reason: str) -> tuple[list[dict[str, Any]], str]:
        """The last deltas, and the finish reason."""
        return [], reason

    def message(self, text: str, reason: str) -> tuple[dict[str, Any], str]:
        """The whole message of `text`, and the finish reason."""
        return {"role": "assistant", "content": text}, reason
