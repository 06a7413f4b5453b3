"""Errors as OpenAI's API has them: a status, a type, and a message that names the way out."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from linspec.errors import (
    ConfigError,
    ContextOverflow,
    InputError,
    LinspecError,
    QueueFull,
    StateError,
    WorkerStopped,
)
from linspec.serve.schemas.base import ErrorAnswer
from linspec.utils.messages import shown

_log = logging.getLogger("linspec.serve")
_WRONG = "invalid_request_error"
_WANTED = "Input should be "
_UNTYPED = (
    "the body is read as JSON where its header says so; send 'Content-Type: application/json'"
)
# the type of an error by its status
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}
# what every endpoint may answer, for the OpenAPI page
RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request breaks a rule."},
    401: {"model": ErrorAnswer, "description": "No key, or an unknown one."},
    404: {"model": ErrorAnswer, "description": "No such model."},
    408: {"model": ErrorAnswer, "description": "The body took too long to arrive."},
    413: {"model": ErrorAnswer, "description": "The body is too large, or has too many values."},
    429: {"model": ErrorAnswer, "description": "The queue is full; see Retry-After."},
    500: {"model": ErrorAnswer, "description": "A fault of the server."},
    503: {"model": ErrorAnswer, "description": "The server shuts down, or has no memory left."},
    504: {"model": ErrorAnswer, "description": "The request took too long."},
    # in the place of the framework's own 422
    "default": {"model": ErrorAnswer, "description": "Any other error."},
}


class Failure(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that a client gets."""
        kind = _TYPES.get(self.status, _WRONG)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def event(self) -> dict[str, Any]:
        """The same as an event of a stream whose events have types."""
        return {**self.body()["error"], "type": "error"}

    def response(self) -> Response:
        """The whole answer."""
        return json_response(self.body(), self.status, self.headers)


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON."""
    return Response(
        json_bytes(data), status, {"content-type": "application/json", **(headers or {})}
    )


def json_bytes(data: Any) -> bytes:
    """JSON in UTF-8; what a client wrote in halves of characters is escaped as it was."""
    return json_text(data).encode("utf-8")


def json_text(data: Any) -> str:
    """JSON on one line, valid Unicode."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def failure_of(error: BaseException) -> Failure:
    """What a client is told about `error`; what is no fault of the client's is logged."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, QueueFull):
        wait = {"retry-after": str(error.retry_after)}
        return Failure(429, str(error), code="queue_full", headers=wait)
    if isinstance(error, WorkerStopped):
        return Failure(503, str(error), code="shutting_down")
    if isinstance(error, ContextOverflow):
        return Failure(400, str(error), code="context_length_exceeded")
    if isinstance(error, ConfigError | InputError):
        return Failure(400, str(error), code="invalid_value")
    _log.error("a request failed: %s", error, exc_info=error)
    if isinstance(error, StateError):
        return Failure(503, str(error), code="state_error")
    return Failure(500, f"the server failed: {shown(str(error))}; its log has more", code="fault")


def head_too_large() -> Failure:
    """What a request is told whose head is longer than a server reads."""
    message = "the head of the request is too large; send fewer or shorter headers"
    return Failure(431, message, code="invalid_http")


def _elsewhere(request: Request) -> str:
    """Where to look for what is not at the path of a request."""
    wanted = f"/v1{request.url.path}"
    if wanted in request.app.openapi()["paths"]:
        return f"{wanted} is what you want: the base URL of a client ends in /v1"
    return "/docs lists what there is"


def install(app: FastAPI) -> None:
    """Let every error of `app` have this shape."""

    async def of_error(request: Request, error: Exception) -> Response:
        return failure_of(error).response()

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _of_validation(error.errors()).response()

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # such as that of a body that is too large, which the framework calls unreadable
        if isinstance(error.__cause__, Failure):
            return error.__cause__.response()
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {shown(request.url.path)}; {_elsewhere(request)}"
        elif error.status_code == 405:
            message = f"{request.method} is not for {shown(request.url.path)}; /docs says what is"
        elif error.status_code == 400:
            message = (
                "the body cannot be read as JSON in UTF-8: it is no JSON, is nested too deeply or has a "
                "number of thousands of digits; send other JSON"
            )
        return Failure(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Failure, of_error)
    app.add_exception_handler(LinspecError, of_error)


def _of_validation(errors: Sequence[Any]) -> Failure:
    """The first thing that is wrong with a body, as a 400."""
    first = _telling(errors)
    place = shown(_place(first))
    if first["type"] == "json_invalid":
        return Failure(400, f"the body is not valid JSON: {_reason(first)}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"{place} is not known here; leave it out, or see /docs"
        return Failure(400, message, code="unknown_parameter", param=place)
    if first["type"] == "none_required":
        message = f"{place} is not served; leave it out, or see /docs"
        return Failure(400, message, code="unsupported_parameter", param=place)
    if first["type"] == "missing":
        message = f"{place or 'a JSON body'} is missing; see /docs"
        return Failure(400, message, code="missing_parameter", param=place or None)
    if not place and isinstance(first.get("input"), bytes):
        return Failure(400, _UNTYPED, code="invalid_content_type")
    got = shown(repr(first.get("input")))
    message = f"{place or 'the body'}: {first['msg']}, got {got}; see /docs"
    return Failure(400, message, code="invalid_value", param=place or None)


def _telling(errors: Sequence[Any]) -> Any:
    """The first error; of one for each form that a field may have, that of the form which was meant."""
    if long := next((each for each in errors if _too_many_texts(each)), None):
        return long
    first = _place(errors[0])
    about = [each for each in errors if f"{_place(each)}.".startswith(f"{first}.")] or errors[:1]
    deepest = max(_place(each).count(".") for each in about)
    inner = [each for each in about if _place(each).count(".") == deepest]
    # a form of another type was not meant
    meant = next((each for each in inner if not each["type"].endswith("_type")), None)
    if meant is not None:
        return meant
    wanted = dict.fromkeys(each["msg"].removeprefix(_WANTED) for each in inner)
    return {**inner[0], "msg": _WANTED + " or ".join(wanted)}


def _too_many_texts(error: Mapping[str, Any]) -> bool:
    """Whether a list of texts is too long: a form of other things would be said to be wanted instead."""
    given = error.get("input")
    return error["type"] == "too_long" and isinstance(given, list) and isinstance(given[0], str)


def _place(error: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in error["loc"][1:] if _is_name(part))


def _is_name(part: object) -> bool:
    """Whether it is part of a place; alternatives of a union stand there too, such as 'list[int]'."""
    return str(part) not in ("str", "int") and re.fullmatch(r"\w+", str(part)) is not None


def _reason(error: Mapping[str, Any]) -> str:
    return shown(str(error.get("ctx", {}).get("error", error["msg"])))
