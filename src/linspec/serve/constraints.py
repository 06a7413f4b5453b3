"""What an output has to look like: formats, grammars and tools, as the settings of a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from linspec.decoding.request import Request
from linspec.decoding.sampling import Grammar, SamplingParams
from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.serve.failures import Failure
from linspec.serve.response_format import answer_grammar
from linspec.serve.schemas.base import GUIDED, Constraints
from linspec.serve.tool_calls import ToolTurn
from linspec.serve.tools import Choice, ToolUse, read_tools

# characters: a grammar of a megabyte is read for ten seconds, in which nothing else runs
LONGEST_GRAMMAR = 2**17
# what a template knows of tools is found out once
_USES: WeakKeyDictionary[LLM, ToolUse] = WeakKeyDictionary()


def constrained(asked: Constraints) -> dict[str, Any]:
    """Settings of SamplingParams for what `asked` wants of its output; raises Failure 400."""
    fields = {name: getattr(asked, name) for name in GUIDED}
    named = [name for name, value in fields.items() if value is not None]
    with _about(named[0] if named else "response_format"):
        grammar = answer_grammar(asked.response_format, fields)
    return {} if grammar is None else {"grammar": _bounded(grammar)}


def _bounded(grammar: Grammar) -> Grammar:
    """Raises Failure 400 for one that would hold the whole process up while the library reads it."""
    if len(grammar.text) > LONGEST_GRAMMAR:
        raise Failure(
            400,
            f"the tools, the schema or the grammar come to {len(grammar.text)} characters, this server reads "
            f"{LONGEST_GRAMMAR}; ask for less at once",
            code="invalid_value",
        )
    return grammar


@dataclass(frozen=True)
class Tooled:
    """A conversation whose answer may call tools."""

    choice: Choice

    @classmethod
    def of(cls, tools: Any, choice: Any, *, several: bool | None) -> Tooled:
        """Raises Failure 400 for what is no tool or no choice of one."""
        with _about("tools"):
            known = read_tools(tools or ())
        with _about("tool_choice"):
            return cls(Choice.of(choice, known, several=several is not False))

    def request(
        self, llm: LLM, messages: Sequence[Mapping[str, Any]], params: SamplingParams
    ) -> Request:
        """As the engine takes it."""
        spoken = any(each.get("tool_calls") or each["role"] == "tool" for each in messages)
        if not self.choice.tools and not spoken:
            return llm.request(llm.encoder.chat(messages), params)
        use = _USES.setdefault(llm, ToolUse(llm.encoder))
        grammar = use.grammar(self.choice, params.grammar)
        if grammar is not None:
            _bounded(grammar)
        prompt = use.prompt(messages, self.choice.tools)
        return llm.request(prompt, replace(params, grammar=grammar))

    def turn(self) -> ToolTurn:
        """The answer, on its way from text to the parts of a message."""
        return ToolTurn(self.choice)


@contextmanager
def _about(param: str) -> Iterator[None]:
    """Say which parameter of the request is wrong."""
    try:
        yield
    except ConfigError as error:
        raise Failure(400, str(error), code="invalid_value", param=param) from error
