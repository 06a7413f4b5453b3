"""The language that an output must be of, as plain data: a JSON schema, a regular expression, a grammar.

SamplingParams(grammar=Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}}))
SamplingParams(grammar=Grammar.regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

JSON_SCHEMA, REGEX, CFG = KINDS = ("json_schema", "regex", "cfg")
# JSON as json.dumps writes it: with free white space a weak model may write nothing else
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must be, from its first character to its last; made by the functions of this class.

    Attributes:
        kind: 'json_schema', 'regex' or 'cfg'.
        text: the schema as JSON, the expression, or the grammar.

    Raises:
        ConfigError: the kind is unknown, or a text cannot be one of its kind. What only the library that
            reads grammars can say, the engine says when a request brings one.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"the kind of a grammar is one of {', '.join(KINDS)}, got {shown(repr(self.kind))}"
                f"{did_you_mean(self.kind, KINDS)}"
            )
        if not isinstance(self.text, str):
            raise ConfigError(
                f"a grammar of kind {self.kind} is a text, got {shown(repr(self.text))}"
            )
        if self.kind == JSON_SCHEMA:
            _check_schema(self.text)
        elif not self.text.strip():
            raise ConfigError(
                f"a grammar of kind {self.kind} needs a text, got {self.text!r}; leave it out for none"
            )

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls(JSON_SCHEMA, _ANY_OBJECT)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that a schema allows, written as `json.dumps` does; the properties in their order.

        schema: a mapping, or its JSON text. Its "x-guidance" may ask for other white space, as the library
        llguidance describes it.
        """
        if isinstance(schema, str):
            return cls(JSON_SCHEMA, schema)
        try:
            return cls(JSON_SCHEMA, json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"a JSON schema holds what JSON can say, got {shown(repr(schema))}: {error}"
            ) from error

    @classmethod
    def regex(cls, expression: str) -> Grammar:
        """A text that a regular expression matches as a whole, in the syntax of Rust's crate regex."""
        return cls(REGEX, expression)

    @classmethod
    def cfg(cls, rules: str) -> Grammar:
        """A text of a context-free grammar, written as Lark's or as llama.cpp's GBNF; it begins at `start`
        or `root`.
        """
        return cls(CFG, rules)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Grammar:
        """One of some texts."""
        given = texts if isinstance(texts, str) else tuple(texts)
        if (
            isinstance(given, str)
            or not given
            or not all(isinstance(each, str) and each for each in given)
        ):
            raise ConfigError(f"a choice is between non-empty texts, got {shown(repr(given))}")
        return cls(CFG, f"start: {' | '.join(json.dumps(each) for each in given)}")


def _check_schema(text: str) -> None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"a JSON schema is JSON, got {shown(text)}: {error}; {_ANY_OBJECT} allows any object"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"a JSON schema is an object, got {shown(text)}; {_ANY_OBJECT} allows any object"
        )
