"""Calls of tools in an answer, as it comes: text is handed on, calls become OpenAI's deltas.

turn = ToolTurn(choice)
for piece in stream:
    deltas = turn.push(piece.text)
deltas, reason = turn.finish("stop")

Forms that are read: `<tool_call>` with an object or a list up to `</tool_call>` (Qwen, Hermes, SmolLM2),
`[TOOL_CALLS]` with a list (Mistral), and bare JSON at the very beginning of an answer. An object is a call if
it names a tool of the request. What turns out to be none is text, character for character.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from linspec.serve.json_span import JsonSpan
from linspec.serve.tools import Choice

_OPENERS = {"<tool_call>": "</tool_call>", "[TOOL_CALLS]": "", "<|python_tag|>": ""}
# the beginning of a call whose arguments can be handed on as they come
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
# the first key of an object, when it is there
_FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"')
_KEYS = ("name", "arguments", "parameters", "function", "type", "id")
_LETTERS = string.ascii_letters + string.digits


@dataclass
class ToolTurn:
    """An answer that may call tools, on its way from text to the parts of a message.

    choice: the tools of the request; of several calls where it wants one, the first is handed on, and nothing
    behind it. Deltas are dicts with 'content' or 'tool_calls'.
    """

    choice: Choice
    calls: int = 0
    # text that may yet become something else, and where in the answer it stands
    _held: str = ""
    _closer: str | None = None
    _bare: bool = True
    _call: _Call | None = None
    # what stands between calls; it is text if no call comes of it
    _between: str = ""
    _names: Collection[str] = field(init=False)

    def __post_init__(self) -> None:
        self._names = {tool.name for tool in self.choice.tools}

    @property
    def calling(self) -> bool:
        """Whether an object that is or may become a call has begun and not ended."""
        return self._call is not None

    def push(self, text: str) -> list[dict[str, Any]]:
        """Deltas of the message for new text."""
        if not self._names:
            return [{"content": text}] if text else []
        return _joined(delta for character in text for delta in self._next(character))

    def finish(self, reason: str) -> tuple[list[dict[str, Any]], str]:
        """The last deltas, and the finish reason: 'tool_calls' where the answer ended with whole calls.

        An end or a stop text may come inside a call: its arguments are no JSON then, and nothing to act on.
        """
        deltas = _joined(self._rest())
        whole = self.calls and not self.calling
        return deltas, "tool_calls" if whole and reason == "stop" else reason

    def message(self, text: str, reason: str) -> tuple[dict[str, Any], str]:
        """The whole message of `text`, and the finish reason."""
        deltas = self.push(text)
        last, reason = self.finish(reason)
        content, calls = "", list[dict[str, Any]]()
        for delta in (*deltas, *last):
            content += delta.get("content", "")
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    calls.append({name: part[name] for name in ("id", "type")})
                    calls[-1]["function"] = dict(part["function"])
                else:
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if calls:
            return {**message, "tool_calls": calls}, reason
        return {**message, "content": content}, reason

    def _next(self, character: str) -> Iterator[dict[str, Any]]:
        if self._call is not None:
            yield from self._in_call(self._call, character)
        elif self.calls and not self.choice.several:
            return
        elif self._closer is None and not self._bare:
            yield from self._in_text(character)
        elif self._closer is None:
            yield from self._at_start(character)
        else:
            yield from self._among_calls(character)

    def _at_start(self, character: str) -> Iterator[dict[str, Any]]:
        """Nothing but white space has come; a bracket may begin bare calls."""
        if character in "{[":
            self._between, self._held, self._closer = self._held, "", ""
            yield from self._among_calls(character)
        elif character.isspace():
            self._held += character
        else:
            self._bare = False
            yield from self._in_text(character)

    def _in_text(self, character: str) -> Iterator[dict[str, Any]]:
        self._held += character
        for opener, closer in _OPENERS.items():
            if self._held.endswith(opener):
                yield from self._release(len(opener))
                self._between, self._held, self._closer = self._held, "", closer
                return
        yield from self._release(max(_overlap(self._held, opener) for opener in _OPENERS))

    def _release(self, kept: int) -> Iterator[dict[str, Any]]:
        """Hand on what is held, all but the last characters and the white space before these."""
        size = len(self._held[: len(self._held) - kept].rstrip())
        yield from _content(self._held[:size])
        self._held = self._held[size:]

    def _among_calls(self, character: str) -> Iterator[dict[str, Any]]:
        """Before, between and behind calls: brackets of a list, commas, white space, the closing tag."""
        if character == "{":
            self._call = _Call(self._names, self.calls)
            yield from self._in_call(self._call, character)
            return
        self._between += character
        tail = self._between.strip()
        if self._closer and tail.endswith(self._closer):
            # tags with no call between them are text
            yield from _content(self._between if tail.startswith("<tool_call>") else "")
            self._closer, self._between, self._bare = None, "", False
        elif self._closer and _overlap(tail, self._closer):
            return
        elif self._bare and tail == "[T":
            # it is no list but a tag
            again, self._between = self._between, ""
            self._closer, self._bare = None, False
            for each in again:
                yield from self._in_text(each)
        elif not (character.isspace() or character in "[],;"):
            yield from self._as_text()

    def _in_call(self, call: _Call, character: str) -> Iterator[dict[str, Any]]:
        found = call.push(character)
        if call.started:
            # what stood before it belongs to the call
            self.calls, self._between = call.index + 1, ""
        yield from found
        if call.failed:
            self._between += call.span.text
            yield from self._as_text()
        elif call.span.over:
            self._call = None

    def _as_text(self) -> Iterator[dict[str, Any]]:
        """What stands before this place is no call; brackets behind calls belong to these."""
        yield from _content(self._between.lstrip("[],; \n\r\t") if self.calls else self._between)
        self._between, self._closer, self._call, self._bare = "", None, None, False

    def _rest(self) -> Iterator[dict[str, Any]]:
        call = self._call
        if call is not None and not call.started:
            yield from _content(self._between + call.span.text)
        elif not self.calls:
            yield from _content(self._between)
        yield from _content(self._held if not self.calls else self._held.rstrip())
        self._between = self._held = ""


class _Call:
    """One call on its way: its name as soon as it is known, then its arguments as they come."""

    def __init__(self, names: Collection[str], index: int) -> None:
        self.span, self.index = JsonSpan(), index
        self.started = self.failed = False
        self._names = names
        # whether arguments are handed on as they come, and whether the first key was looked at
        self._flowing = self._judged = False

    def push(self, character: str) -> list[dict[str, Any]]:
        """Deltas for the next character of the object."""
        self.span.push(character)
        if self._flowing:
            return self._more(character)
        if self.started:
            return []
        if self.span.over:
            return self._whole()
        if character == "{" and (head := _HEAD.match(self.span.text)):
            return self._begin(head)
        if character == '"' and not self._judged:
            key = _FIRST_KEY.match(self.span.text)
            self._judged = key is not None
            self.failed = key is not None and key[1] not in _KEYS
        return []

    def _begin(self, head: re.Match[str]) -> list[dict[str, Any]]:
        if head[1] not in self._names:
            self.failed = True
            return []
        self._flowing = True
        return [self._start(head[1], "{")]

    def _more(self, character: str) -> list[dict[str, Any]]:
        """The next character, if it belongs to the arguments: these end where one bracket is open."""
        self._flowing = self.span.depth > 1
        return [self._part({"arguments": character})]

    def _whole(self) -> list[dict[str, Any]]:
        """A call that was not recognized by its beginning."""
        try:
            found = json.loads(self.span.text)
        except (ValueError, RecursionError):
            found = {}
        found = found.get("function") if isinstance(found.get("function"), dict) else found
        name, given = found.get("name"), found.get("arguments", found.get("parameters", {}))
        known = isinstance(name, str) and name in self._names
        if not known or not isinstance(given, dict | str):
            self.failed = True
            return []
        return [self._start(name, given if isinstance(given, str) else json.dumps(given))]

    def _start(self, name: str, arguments: str) -> dict[str, Any]:
        self.started = True
        # some templates refuse an id of another length
        made = "".join(secrets.choice(_LETTERS) for _ in range(9))
        head = {"id": made, "type": "function"}
        return self._part({"name": name, "arguments": arguments}, head)

    def _part(self, function: dict[str, str], head: dict[str, str] | None = None) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.index, **(head or {}), "function": function}]}


def _content(text: str) -> Iterator[dict[str, Any]]:
    if text:
        yield {"content": text}


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    sizes = range(min(len(text), len(tag) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)


def _joined(deltas: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Deltas of which neighbours of a kind are one."""
    found: list[dict[str, Any]] = []
    for delta in deltas:
        last = found[-1] if found else {}
        if "content" in delta and "content" in last:
            last["content"] += delta["content"]
        elif "tool_calls" in delta and "tool_calls" in last and "id" not in delta["tool_calls"][0]:
            last["tool_calls"][0]["function"]["arguments"] += delta["tool_calls"][0]["function"][
                "arguments"
            ]
        else:
            found.append(delta)
    return found
