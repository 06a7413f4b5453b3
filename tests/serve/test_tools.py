"""Tools: told to any template, called in any form, streamed in any pieces, and forced where needed."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import pytest
from checkpoints import text_model, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from linspec import LLM, Grammar, SamplingParams
from linspec.engine.encoding import TextEncoder
from linspec.errors import ConfigError, InputError
from linspec.serve.tool_calls import ToolTurn
from linspec.serve.tools import (
    BARE,
    HERMES,
    LISTED,
    LLAMA,
    MISTRAL,
    CallForm,
    Choice,
    Tool,
    ToolUse,
    form_of,
    read_tools,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says what the weather is.",
        "parameters": {
            "type": "object",
            "$defs": {"place": {"type": "string", "maxLength": 3}},
            "properties": {"city": {"$ref": "#/$defs/place"}, "days": {"enum": [1, 2]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
STOP = {"type": "function", "name": "stop.all"}
TOOLS = read_tools([WEATHER, STOP])
CALLS = [("get_weather", {"city": 'P"\\}'}), ("stop.all", {}), ("get_weather", {"a": [{"b": "]"}]})]
PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KNOWS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Is it dry?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Bo"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"},
]


def use(template: str) -> ToolUse:
    # the tiny one is shared by all tests
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = template
    return ToolUse(TextEncoder(tokenizer, len(tokenizer)))


def written(form: CallForm, calls: list[tuple[str, dict[str, Any]]]) -> str:
    found = [json.dumps({"name": name, form.arguments: given}) for name, given in calls]
    return f"{form.first}{(form.between or '').join(found)}{form.last}"


def read(
    text: str, cuts: list[int], tools: tuple[Tool, ...] | Choice = TOOLS
) -> tuple[str, list[Any], str]:
    """Text, calls and reason of an answer that comes in pieces."""
    turn = ToolTurn(tools if isinstance(tools, Choice) else Choice.of(None, tools))
    ends = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    deltas: list[dict[str, Any]] = []
    for begin, end in itertools.pairwise(ends):
        deltas += turn.push(text[begin:end])
    last, reason = turn.finish("stop")
    content, calls = "", list[Any]()
    for delta in deltas + last:
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == len(calls) and re.fullmatch("[A-Za-z0-9]{9}", part["id"])
                calls.append([part["function"]["name"], ""])
            calls[part["index"]][1] += part["function"]["arguments"]
    return content, [(name, json.loads(given)) for name, given in calls], reason


cuts = st.lists(st.integers(0, 400), max_size=30)


@given(
    st.sampled_from([HERMES, LISTED, MISTRAL, BARE, LLAMA]),
    st.lists(st.sampled_from(CALLS), min_size=1, max_size=3),
    st.sampled_from(["", "Let me see. ", "a < b [1] {x}\n\n"]),
    st.sampled_from(["", "\n", "\nDone."]),
    cuts,
)
def test_calls_of_every_form_are_read_from_any_pieces(
    form: CallForm, calls: list[Any], before: str, after: str, cuts: list[int]
) -> None:
    if form.between is None:
        calls = calls[:1]
    if not form.first.startswith("<"):
        # without a tag a call is known by its place
        before = ""
    text = before + written(form, calls) + after
    content, found, reason = read(text, cuts)
    assert found == calls and reason == "tool_calls"
    assert content.strip() == (before + after).strip() or content == before.rstrip() + after
    whole, reason = ToolTurn(Choice.of(None, TOOLS)).message(text, "stop")
    assert reason == "tool_calls" and (whole["content"] or "") == content
    assert [
        (each["function"]["name"], json.loads(each["function"]["arguments"]))
        for each in whole["tool_calls"]
    ] == calls


fragments = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[T", "[", "]", "{", "}", '{"'),
        *('"name"', '"arguments"', ": ", ", ", '"', "\\", "a", "\n", " ", "é", "get_weather"),
        *('{"name": "other", "arguments": {}}', '{"a": 1}', "[1, {}]"),
    ]
)


@given(st.lists(fragments, max_size=12).map("".join), cuts)
@example('{"city": "Bonn", "name": 3} and', [3])
@example('<tool_call>{"name": "other", "arguments": {"a": 1}}</tool_call>', [30])
@example("[TOOL_CALLS] nothing", [])
@example('<tool_call>\n{"name": ["x"]}', [])
def test_what_is_no_call_is_text_character_for_character(text: str, cuts: list[int]) -> None:
    content, calls, reason = read(text, cuts)
    if not calls:
        assert content == text and reason == "stop"


def test_text_streams_at_once_and_arguments_as_they_come() -> None:
    turn = ToolTurn(Choice.of(None, TOOLS))
    assert turn.push("Well, ") == [{"content": "Well,"}]
    assert turn.push("I look") == [{"content": " I look"}]
    assert turn.push("\n<tool_ca") == []
    assert turn.push('ll>{"name": "get_weather", "argum') == []
    (begun,) = turn.push('ents": {"city": "B')
    assert begun["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "B'}
    (more,) = turn.push('onn"}')
    assert more == {"tool_calls": [{"index": 0, "function": {"arguments": 'onn"}'}}]}
    assert turn.push("}</tool_call>") == []
    assert turn.finish("stop") == ([], "tool_calls")
    cut = ToolTurn(Choice.of(None, TOOLS))
    cut.push('<tool_call>{"name": "stop.all", "arguments": {"a": ')
    assert cut.finish("length") == ([], "length")


@given(st.sampled_from([HERMES, LISTED, MISTRAL, BARE]), st.sampled_from(["", "\nDone."]), cuts)
def test_one_call_alone_comes_where_parallel_tool_calls_is_false(
    form: CallForm, after: str, cuts: list[int]
) -> None:
    text = written(form, CALLS[:2] if form.between else CALLS[:1]) + after
    one = Choice.of("auto", TOOLS, several=False)
    assert read(text, cuts, one) == ("", CALLS[:1], "tool_calls")
    message, reason = ToolTurn(one).message(text, "stop")
    assert len(message["tool_calls"]) == 1 and message["content"] is None
    assert reason == "tool_calls"
    # text before it is handed on as ever
    if form.first.startswith("<"):
        assert read("So: " + text, cuts, one)[0] == "So:"


@pytest.mark.parametrize("form", [HERMES, LISTED, BARE])
@pytest.mark.parametrize("before", [0, 1])
def test_a_call_that_a_stop_text_cuts_is_no_tool_calls(form: CallForm, before: int) -> None:
    if before and not form.between:
        return
    text = written(form, CALLS[: before + 1])
    end = text.rindex("arguments") + len('arguments": {"')
    message, reason = ToolTurn(Choice.of("auto", TOOLS)).message(text[:end], "stop")
    assert reason == "stop" and len(message["tool_calls"]) == before + 1
    whole, reason = ToolTurn(Choice.of("auto", TOOLS)).message(text, "stop")
    assert reason == "tool_calls" and len(whole["tool_calls"]) == before + 1


def test_calls_in_other_orders_and_wrappings_are_read_too() -> None:
    for text in (
        '<tool_call>{"arguments": {"a": 1}, "name": "stop.all"}</tool_call>',
        '{"name": "stop.all", "arguments": "{\\"a\\": 1}"}',
        '[{"type": "function", "function": {"name": "stop.all", "arguments": {"a": 1}}}]',
        '{"type": "function", "name": "stop.all", "parameters": {"a": 1}}',
        '[TOOL_CALLS][{"name": "stop.all", "arguments": {"a": 1}, "id": "x"}]',
    ):
        assert read(text, [9, 20]) == ("", [("stop.all", {"a": 1})], "tool_calls"), text
    assert read(written(HERMES, CALLS), [], ()) == (written(HERMES, CALLS), [], "stop")


def test_long_arguments_take_time_in_proportion() -> None:
    given = {"city": "a{" * 50_000}
    assert read(written(BARE, [("get_weather", given)]), [])[1] == [("get_weather", given)]
    assert read('{"name": "' + "a" * 100_000, [])[1] == []


def test_a_template_that_knows_tools_gets_them_and_another_is_told_in_words() -> None:
    known = use(KNOWS)
    assert known.native and known.form == HERMES
    text = known.text(HISTORY, TOOLS)
    assert text.startswith("<tools>") and text.endswith("<|assistant|>")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bo"}}\n</tool_call>' in text
    plain = use(PLAIN)
    assert not plain.native and plain.form == LISTED
    text = plain.text(HISTORY, TOOLS)
    assert text.count("<|system|>") == 1 and text.startswith(
        "<|system|>Be short.\n\nYou have access"
    )
    assert "Says what the weather is." in text and "Result of the tool: rain" in text
    assert read(text.split("<|assistant|>")[1], [])[1] == [("get_weather", {"city": "Bo"})]
    assert "You have access" not in plain.text(HISTORY, ())
    assert plain.text(HISTORY[1:2], TOOLS).startswith("<|system|>You have access")
    assert plain.prompt(HISTORY, TOOLS) == tiny_tokenizer().encode(text)
    assert not use("{{ raise_exception('no') if tools }}" + PLAIN).native


def test_the_form_of_calls_is_that_of_the_template() -> None:
    assert form_of("… <tool_call>\n{…}\n</tool_call>") == HERMES
    assert form_of("… <tool_call>[ …]</tool_call>") == LISTED
    assert form_of("[AVAILABLE_TOOLS] [TOOL_CALLS]") == MISTRAL
    assert form_of('"parameters": dictionary of argument name and its value') == LLAMA
    assert form_of("{{ tools }}") == BARE


FORMS = {
    "hermes": KNOWS,
    "listed": PLAIN,
    "mistral": "{{ tools }}[TOOL_CALLS]" + PLAIN,
    "llama": '{{ tools }}"parameters": {}' + PLAIN,
}
MODEL = text_model("aug")


@given(st.sampled_from(sorted(FORMS)), st.booleans(), st.integers(0, 99))
@settings(max_examples=settings().max_examples, deadline=None)
def test_a_needed_call_is_always_one(form: str, named: bool, seed: int) -> None:
    """A random model calls a tool of the request with arguments of its schema, in the template's form."""
    told = {"type": "function", "function": {"name": "get_weather"}} if named else "required"
    tools = read_tools([WEATHER, {**STOP, "parameters": {"enum": [{}, {"u": "http://x // y"}]}}])
    choice = Choice.of(told, tools, several=seed % 2 == 0)
    grammar = use(FORMS[form]).grammar(choice)
    llm = LLM(MODEL, tokenizer=tiny_tokenizer(), drafter="grammar", policy=8)
    params = SamplingParams(max_tokens=220, temperature=1.0, seed=seed, grammar=grammar)
    found = llm.generate("a", params)[0]
    if found.finish_reason == "length":
        return
    content, calls, _ = read(found.text, [])
    assert content == "" and calls
    assert len(calls) == 1 or choice.several
    for name, arguments in calls:
        assert name in {tool.name for tool in choice.tools}
        if name == "get_weather":
            assert {"city"} <= {*arguments} <= {"city", "days"} and len(arguments["city"]) <= 3


@pytest.mark.parametrize("form", ["hermes", "listed"])
def test_an_answer_of_a_schema_may_be_a_call_too(form: str) -> None:
    choice, answer = (
        Choice.of("auto", TOOLS, several=False),
        Grammar.json_schema({"enum": [{"a": 1}]}),
    )
    both = use(FORMS[form]).grammar(choice, answer)
    llm = LLM(MODEL, tokenizer=tiny_tokenizer())
    found = set()
    for seed in range(40):
        params = SamplingParams(max_tokens=60, temperature=9.0, seed=seed, grammar=both)
        done = llm.generate("a", params)[0]
        if done.finish_reason == "length":
            # only a call is ever that long
            found.add("call")
            continue
        content, calls, _ = read(done.text, [])
        assert (content == '{"a": 1}') != bool(calls)
        found.add("call" if calls else "answer")
    assert found == {"call", "answer"}
    word = Grammar.regex("a")
    assert use(PLAIN).grammar(choice, word) == word
    assert use(FORMS["llama"]).grammar(choice, answer) == answer
    assert use(PLAIN).grammar(Choice.of("none", TOOLS), answer) == answer


def test_choices() -> None:
    assert Choice.of("auto", TOOLS) == Choice.of(None, TOOLS) == Choice(TOOLS)
    assert Choice.of("none", TOOLS).tools == ()
    assert Choice.of({"type": "function", "name": "stop.all"}, TOOLS).tools == TOOLS[1:]
    assert use(PLAIN).grammar(Choice.of("auto", TOOLS)) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "tools are a list"),
        ([3], "a tool is"),
        ([{"type": "retrieval"}], "a tool is"),
        ([{"type": "function"}], "the name of a tool"),
        ([{"type": "function", "function": {"name": "a b"}}], "the name of a tool.*got 'a b'"),
        ([STOP, STOP], "two tools are named 'stop.all'"),
        ([{**STOP, "parameters": [1]}], "the parameters are a JSON schema"),
    ],
)
def test_what_is_no_tool_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_tools(given)


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="names one of get_weather, stop.all.*did you mean 'get_weather'"
    ):
        Choice.of({"function": {"name": "get_wether"}}, TOOLS)
    for wrong in (3, "any", {"function": 3}):
        with pytest.raises(ConfigError, match="tool_choice is 'auto'"):
            Choice.of(wrong, TOOLS)
    with pytest.raises(ConfigError, match="needs tools"):
        Choice.of("required", ())
    with pytest.raises(InputError, match="a tool call of a message is"):
        use(PLAIN).text([{"role": "assistant", "tool_calls": [{"name": "x"}]}], TOOLS)
