"""Lines of a batch: what one asks for, and what is written about it.

Two forms may stand in one file. OpenAI's names a call of the server:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

and the simple one is the body of a completion or, with `messages`, of a chat:

    {"prompt": "def f(", "max_tokens": 20}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from linspec.utils.messages import shown

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# what the id of every line begins with
ID_PREFIX = "batch_req_"
URLS = (CHAT, COMPLETIONS, "/v1/responses", "/v1/embeddings")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input.

    Attributes:
        number: of the line in its file, from 1.
        id: of its text and the model that it asks: where these are equal, it is.
        custom_id: what the line calls itself; None where it does not.
        simple: whether it has the simple form.
        url, body: what the server is asked.
        fault: why nothing can be asked; '' where it can.
    """

    number: int
    id: str
    custom_id: str | None = None
    simple: bool = False
    url: str = COMPLETIONS
    body: Mapping[str, Any] | None = None
    fault: str = ""


def id_of(raw: bytes, model: str) -> str:
    """The id of what a line asks a model."""
    found = hashlib.sha256(model.encode() + bytes(1) + raw.strip()).hexdigest()[:24]
    return f"{ID_PREFIX}{found}"


def read_line(number: int, raw: bytes, model: str, max_tokens: int = 512) -> Line:
    """A line as it asks `model`; what is wrong with it is its `fault`, and never raised.

    max_tokens: of a line of the simple form that names none.
    """
    line = Line(number, id_of(raw, model))
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return replace(line, fault=f"the line is not UTF-8 text (byte {error.start}); convert it")
    except (ValueError, RecursionError) as error:
        return replace(line, fault=f"the line is not JSON: {error}")
    if not isinstance(data, dict):
        return replace(line, fault=f"a line is a JSON object, got {shown(repr(data))}")
    own = data.pop("custom_id", None)
    if own is not None and not isinstance(own, str):
        return replace(line, fault=f"custom_id must be a string, got {shown(repr(own))}")
    line = replace(line, custom_id=own)
    if "prompt" in data or "messages" in data:
        url = CHAT if "messages" in data else COMPLETIONS
        body = {"max_tokens": max_tokens, **data}
        return _with_model(replace(line, simple=True, url=url, body=body), model)
    return _with_model(_call(line, data), model)


def _call(line: Line, data: dict[str, Any]) -> Line:
    """A line of OpenAI's form."""
    if line.custom_id is None:
        return replace(
            line,
            fault="the line has neither a prompt nor messages nor a custom_id; give it a prompt, or "
            "custom_id, method, url and body",
        )
    method, url, body = data.get("method", "POST"), data.get("url"), data.get("body")
    if method != "POST":
        return replace(line, fault=f"method must be POST, got {shown(repr(method))}")
    if url not in URLS:
        return replace(line, fault=f"url must be one of {', '.join(URLS)}, got {shown(repr(url))}")
    if not isinstance(body, dict):
        return replace(line, fault=f"body must be a JSON object, got {shown(repr(body))}")
    return replace(line, url=url, body=body)


def _with_model(line: Line, model: str) -> Line:
    if line.fault or line.body is None:
        return line
    if line.body.get("stream"):
        return replace(line, fault="a batch does not stream; leave stream out")
    return replace(line, body={"model": model, **line.body})


def answered(line: Line, status: int, body: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """What is written about a line that the server answered."""
    known = _known(line)
    if not line.simple:
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {**known, "response": response, "error": None}
    if status != 200:
        return {**known, "error": body.get("error", body)}
    choices = body["choices"]
    texts = [each["text"] if "text" in each else each["message"]["content"] for each in choices]
    found = {"text": texts[0], "finish_reason": choices[0]["finish_reason"]}
    if len(texts) > 1:
        found["texts"] = texts
    return {**known, **found, "usage": body.get("usage"), "error": None}


def refused(line: Line) -> dict[str, Any]:
    """What is written about a line that asks for nothing."""
    error = {"code": "invalid_line", "message": f"line {line.number}: {line.fault}"}
    return {**_known(line), **({} if line.simple else {"response": None}), "error": error}


def _known(line: Line) -> dict[str, Any]:
    return {"id": line.id, "custom_id": line.custom_id, "line": line.number}


def failed(record: Mapping[str, Any]) -> bool:
    """Whether what was written about a line is an error."""
    response = record.get("response")
    return bool(record["error"]) or (response is not None and response["status_code"] != 200)


def usage_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The usage of what was written about a line; empty where there is none."""
    response = record.get("response") or {}
    return record.get("usage") or response.get("body", {}).get("usage") or {}
