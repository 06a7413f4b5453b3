"""What a request says of its answer's form is a grammar, or an error that names the field."""

from __future__ import annotations

from typing import Any

import pytest

from linspec import Grammar
from linspec.errors import ConfigError
from linspec.serve.response_format import answer_grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("form", "fields", "grammar"),
    [
        (None, {}, None),
        ({"type": "text"}, {"guided_json": None}, None),
        ({"type": "json_object"}, {}, Grammar.json_object()),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
            {},
            Grammar.json_schema(SCHEMA),
        ),
        ({"type": "json_schema", "name": "x", "schema": SCHEMA}, {}, Grammar.json_schema(SCHEMA)),
        ({"type": "regex", "pattern": "a+"}, {}, Grammar.regex("a+")),
        ({"type": "grammar", "grammar": "start: A"}, {}, Grammar.cfg("start: A")),
        (None, {"guided_json": SCHEMA}, Grammar.json_schema(SCHEMA)),
        (None, {"guided_json": '{"type": "object"}'}, Grammar.json_object()),
        (None, {"guided_regex": "a+", "guided_choice": None}, Grammar.regex("a+")),
        (None, {"guided_choice": ["a", "b"]}, Grammar.choice(["a", "b"])),
        (None, {"guided_grammar": "start: A"}, Grammar.cfg("start: A")),
        (None, {"structured_outputs": {"regex": "a+"}}, Grammar.regex("a+")),
        (
            None,
            {"structured_outputs": {"regex": "a+", "json": None, "disable_fallback": False}},
            Grammar.regex("a+"),
        ),
    ],
)
def test_forms_and_fields_are_grammars(
    form: Any, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    assert answer_grammar(form, fields) == grammar


@pytest.mark.parametrize(
    ("form", "fields", "said"),
    [
        ("json", {}, "response_format has the type text, .* got 'json'"),
        ({"type": "json_objct"}, {}, "did you mean 'json_object'"),
        ({"type": "json_schema"}, {}, "needs a schema"),
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, {}, "needs a schema"),
        ({"type": "regex"}, {}, "needs a text under pattern, got None"),
        (None, {"guided_regex": 3}, "is a text, got 3"),
        (None, {"guided_regex": "a", "guided_json": SCHEMA}, "guided_json and guided_regex"),
        (None, {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs has one of"),
        (None, {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "whitespace_pa"),
        ({"type": "json_object"}, {"guided_regex": "a"}, "a response_format or a guided field"),
    ],
)
def test_what_is_no_form_is_refused(form: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        answer_grammar(form, fields)
