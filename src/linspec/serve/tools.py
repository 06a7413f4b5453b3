"""Tools: how a model is told of them, and the grammar of an answer that has to call one.

use = ToolUse(encoder)
prompt = use.prompt(messages, tools)
grammar = use.grammar(tools, Choice.of("required", tools))

A chat template that knows tools is given them. For any other the system message says what they are and how
they are called. How calls are read from the answer is in `linspec.serve.tool_calls`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from linspec.decoding.sampling.grammar import JSON_FORM, JSON_SCHEMA, Grammar
from linspec.engine.encoding import Conversation, TextEncoder
from linspec.errors import ConfigError, InputError
from linspec.utils.messages import did_you_mean, shown

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the caller runs: its name, what it is for, and the JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As templates and OpenAI's API have it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


def read_tools(given: Any) -> tuple[Tool, ...]:
    """The tools of a request, in OpenAI's form; that of its responses, without 'function', is one too.

    Raises ConfigError for what is none.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ConfigError(f"tools are a list, got {shown(repr(given))}")
    tools = tuple(_tool(each) for each in given)
    for name, count in Counter(tool.name for tool in tools).items():
        if count > 1:
            raise ConfigError(f"two tools are named {name!r}; give each a name of its own")
    return tools


def _tool(given: Any) -> Tool:
    kind = given.get("type", "function") if isinstance(given, Mapping) else None
    if kind != "function":
        raise ConfigError(
            f"a tool is {{'type': 'function', 'function': {{'name': …}}}}, got {shown(repr(given))}"
        )
    function = given.get("function", given)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name of a tool has 1 to 64 letters, digits, '_', '.' or '-', got {shown(repr(name))}"
        )
    description = function.get("description") or ""
    parameters = function.get("parameters") or _NO_PARAMETERS
    if not isinstance(description, str) or not isinstance(parameters, Mapping):
        raise ConfigError(
            f"tool {name!r}: the description is a text and the parameters are a JSON schema, got "
            f"{shown(repr(description))} and {shown(repr(parameters))}"
        )
    # a schema of no kind would let the arguments be no object
    return Tool(name, description, {"type": "object", **parameters})


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tools an answer may call, and whether it has to.

    Attributes:
        tools: those that it may call.
        needed: whether it has to call one.
        several: whether it may call more than one at once.
    """

    tools: tuple[Tool, ...]
    needed: bool = False
    several: bool = True

    @classmethod
    def of(cls, given: Any, tools: Sequence[Tool], *, several: bool = True) -> Choice:
        """What tool_choice says: None, 'auto', 'none', 'required' or one tool by its name.

        Raises ConfigError for anything else, and for a choice among no tools.
        """
        known = tuple(tools)
        if given is None or given == "auto":
            return cls(known, False, several)
        if given == "none":
            return cls(())
        if not known:
            raise ConfigError(f"tool_choice {shown(repr(given))} needs tools, got none; give some")
        if given == "required":
            return cls(known, True, several)
        name = _named(given)
        found = tuple(tool for tool in known if tool.name == name)
        if not found:
            names = [tool.name for tool in known]
            raise ConfigError(
                f"tool_choice is 'auto', 'none', 'required' or names one of {', '.join(names)}, got "
                f"{shown(repr(given))}{did_you_mean(name, names)}"
            )
        return cls(found, True, False)


def _named(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return None
    function = given.get("function", given)
    return function.get("name") if isinstance(function, Mapping) else None


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls are written: `first`, calls with `between`, `last`. A call is JSON.

    between: None for one call at most. arguments: the key of the arguments in a call.
    """

    first: str
    between: str | None
    last: str
    arguments: str = "arguments"


HERMES = CallForm("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")
LISTED = CallForm("<tool_call>[", ", ", "]</tool_call>")
# [TOOL_CALLS] itself is a special token, which is no part of a text
MISTRAL = CallForm("[", ", ", "]")
BARE = CallForm("", None, "")
LLAMA = CallForm("", None, "", "parameters")


def form_of(template: str) -> CallForm:
    """The form that a chat template which knows tools teaches."""
    if re.search(r"<tool_call>\s*\[", template):
        return LISTED
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    return LLAMA if re.search(r'"parameters": ?(dictionary|\{)', template) else BARE


class ToolUse:
    """Prompts and grammars with tools, for one tokenizer and its chat template."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    @cached_property
    def native(self) -> bool:
        """Whether the chat template knows tools."""
        probe: Conversation = [{"role": "user", "content": "a"}]
        tool = Tool("probe_of_tools", "", _NO_PARAMETERS)
        try:
            return tool.name in self._encoder.render(probe, tools=[tool.to_json()])
        except InputError:
            # a template that fails with tools does not know them
            return False

    @cached_property
    def form(self) -> CallForm:
        """How the model is to write calls."""
        if not self.native:
            return LISTED
        template = self._encoder.tokenizer.chat_template
        return form_of(template if isinstance(template, str) else json.dumps(template))

    def prompt(self, messages: Conversation, tools: Sequence[Tool]) -> list[int]:
        """Token ids of a conversation with earlier calls and their results, and of its tools."""
        return self._encoder.encode(self.text(messages, tools), special=False)

    def text(self, messages: Conversation, tools: Sequence[Tool]) -> str:
        """The same as text."""
        if self.native:
            known = [_with_objects(message) for message in messages]
            return self._encoder.render(known, tools=[tool.to_json() for tool in tools])
        plain = [_as_text(message) for message in messages]
        return self._encoder.render(_told(plain, tools) if tools else plain)

    def grammar(self, choice: Choice, answer: Grammar | None = None) -> Grammar | None:
        """The grammar of an answer that has to call a tool, or may and is of a language otherwise.

        answer: that language. If it is not JSON, or calls have no tag, the answer calls no tool: the two
            cannot be told apart by their first characters.
        """
        if choice.needed:
            return Grammar.cfg("\n".join(["start: calls", *self._rules(choice)]))
        if answer is None or answer.kind != JSON_SCHEMA or not choice.tools:
            return answer
        if not self.form.first.startswith("<"):
            return answer
        plain = f"answer: {_json_of(json.loads(answer.text))}"
        return Grammar.cfg("\n".join(["start: calls | answer", plain, *self._rules(choice)]))

    def _rules(self, choice: Choice) -> list[str]:
        """What `calls` are."""
        form, rules = self.form, list[str]()
        for i, tool in enumerate(choice.tools):
            head = f'{{"name": {json.dumps(tool.name)}, "{form.arguments}": '
            rules += [f"call{i}: {json.dumps(head)} arguments{i} {json.dumps('}')}"]
            rules += [f"arguments{i}: {_json_of(tool.parameters)}"]
        ends = [json.dumps(each) if each else "" for each in (form.first, form.last)]
        more = f"({json.dumps(form.between)} call)*" if choice.several and form.between else ""
        either = " | ".join(f"call{i}" for i in range(len(choice.tools)))
        return [f"calls: {ends[0]} call {more} {ends[1]}", f"call: {either}", *rules]


def _json_of(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({'x-guidance': JSON_FORM, **schema})}"


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as objects, which templates write as JSON themselves."""
    found = dict(message)
    if found.get("content") is None:
        found["content"] = ""
    if found.get("tool_calls"):
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": arguments_of(call)}}
            for call in _calls(message)
        ]
    return found


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a template that knows neither calls nor their results."""
    content = message.get("content") or ""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"Result of the tool: {content}"}
    if not message.get("tool_calls"):
        return {**message, "content": content}
    calls = [
        {"name": call["function"]["name"], "arguments": arguments_of(call)}
        for call in _calls(message)
    ]
    rest = {name: each for name, each in message.items() if name != "tool_calls"}
    return {**rest, "content": f"{content}{LISTED.first[:-1]}{json.dumps(calls)}{LISTED.last[1:]}"}


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    calls = message["tool_calls"]
    for call in calls if isinstance(calls, Sequence) else (calls,):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                "a tool call of a message is {'id': …, 'type': 'function', 'function': {'name': …, "
                f"'arguments': …}}}}, got {shown(repr(call))}"
            )
    return calls


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments of a call as an object; a text that is no JSON stays one."""
    given = call["function"].get("arguments")
    if not isinstance(given, str):
        return given or {}
    try:
        return json.loads(given) if given.strip() else {}
    except (ValueError, RecursionError):
        return given


def _told(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """A conversation whose system message says what the tools are and how they are called."""
    example = (
        f'{LISTED.first}{{"name": "tool_name", "arguments": {{"argument": "value"}}}}{LISTED.last}'
    )
    described = json.dumps([tool.to_json()["function"] for tool in tools], ensure_ascii=False)
    said = (
        f"You have access to the following tools:\n<tools>{described}</tools>\n\nTo call tools, answer with "
        f"a list of calls in exactly this form and nothing else:\n{example}\n\nIf no tool is of use, or when "
        "you have the result of one, answer in plain text."
    )
    if messages and messages[0].get("role") in ("system", "developer"):
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{said}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]
