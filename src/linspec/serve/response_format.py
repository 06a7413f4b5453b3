"""What a request says of the form of its answer, as a grammar: OpenAI's response_format, vLLM's fields.

response_grammar({"type": "json_schema", "json_schema": {"name": "city", "schema": {...}}})
guided_grammar({"guided_regex": "[0-9]+"})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from linspec.decoding.sampling import Grammar
from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

# fields of vLLM's API, the older ones and those of its structured_outputs
_GUIDED: Mapping[str, Callable[[Any], Grammar]] = {
    "guided_json": Grammar.json_schema,
    "guided_regex": Grammar.regex,
    "guided_choice": Grammar.choice,
    "guided_grammar": Grammar.cfg,
}
_STRUCTURED = {name.removeprefix("guided_"): make for name, make in _GUIDED.items()}
_FORMS = ("text", "json_object", "json_schema", "regex", "grammar")


def response_grammar(form: Any) -> Grammar | None:
    """The grammar of a response_format; None for text. Raises ConfigError for what is none.

    Takes the form of chat completions, {"type": "json_schema", "json_schema": {"schema": …}}, that of
    responses, which has the schema beside its type, {"type": "regex", "pattern": …} and
    {"type": "grammar", "grammar": …}.
    """
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_object()
    if kind == "json_schema":
        return _schema(form)
    if kind == "regex":
        return Grammar.regex(_field(form, "pattern"))
    if kind == "grammar":
        return Grammar.cfg(_field(form, "grammar"))
    raise ConfigError(
        f"response_format has the type {', '.join(_FORMS[:-1])} or {_FORMS[-1]}, got "
        f"{shown(repr(form if kind is None else kind))}{did_you_mean(kind, _FORMS)}"
    )


def _schema(form: Mapping[str, Any]) -> Grammar:
    held = form.get("json_schema", form)
    schema = held.get("schema") if isinstance(held, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConfigError(
            "response_format json_schema needs a schema, an object under json_schema.schema, got "
            f"{shown(repr(held))}; json_object allows any object"
        )
    return Grammar.json_schema(schema)


def _field(form: Mapping[str, Any], name: str) -> str:
    text = form.get(name)
    if not isinstance(text, str):
        raise ConfigError(
            f"response_format {form['type']} needs a text under {name}, got {shown(repr(text))}"
        )
    return text


def guided_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """The grammar in vLLM's guided_json, guided_regex, guided_choice, guided_grammar or structured_outputs.

    None where all are None or missing. Raises ConfigError for more than one.
    """
    found = {name: fields[name] for name in _GUIDED if fields.get(name) is not None}
    structured = fields.get("structured_outputs")
    if structured is not None:
        if not isinstance(structured, Mapping) or not structured.keys() & _STRUCTURED.keys():
            raise ConfigError(
                f"structured_outputs has one of {', '.join(_STRUCTURED)}, got {shown(repr(structured))}"
            )
        # clients write all fields, those that they do not use as null or false
        other = [name for name in structured if name not in _STRUCTURED and structured[name]]
        if other:
            raise ConfigError(
                f"structured_outputs knows {', '.join(_STRUCTURED)}, got {shown(other[0])} too; leave it out"
            )
        found |= {
            f"guided_{name}": structured[name]
            for name in _STRUCTURED
            if structured.get(name) is not None
        }
    if len(found) > 1:
        raise ConfigError(f"give one of {' and '.join(found)}: an answer is of one language")
    return next((_GUIDED[name](given) for name, given in found.items()), None)


def answer_grammar(form: Any, fields: Mapping[str, Any]) -> Grammar | None:
    """The grammar of a request, by its response_format or one of vLLM's fields; ConfigError for both."""
    told, guided = response_grammar(form), guided_grammar(fields)
    if told is not None and guided is not None:
        raise ConfigError("give a response_format or a guided field: an answer is of one language")
    return told or guided
