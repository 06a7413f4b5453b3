"""Formats, grammars and tools through the official client: the answer is of the form that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from api_server import quiet, running, talker
from checkpoints import tiny_tokenizer

from linspec.decoding.sampling import Grammar, SamplingParams
from linspec.llm import LLM
from linspec.serve.worker import Worker

Started = tuple[str, dict[str, Worker]]
HELLO: Any = [{"role": "user", "content": "ab cd"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["red", "green"]}, "many": {"type": "boolean"}},
    "required": ["kind", "many"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"additionalProperties": False}},
    },
]


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    with running({"talker": LLM(talker(), max_batch=4, drafter="grammar+suffix")}) as started:
        yield started


@pytest.fixture
def client(server: Started) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as made:
        yield made


def valid(text: str | None) -> bool:
    found = json.loads(text or "")
    return found.keys() == {"kind", "many"} and found["kind"] in ("red", "green")


def test_an_answer_has_the_format_that_was_asked_for(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "talker", "messages": HELLO, "temperature": 1.0, "seed": 3}
    whole = client.chat.completions.create(**asked, n=3, response_format=FORMAT)
    assert all(valid(choice.message.content) for choice in whole.choices)
    pieces = client.chat.completions.create(**asked, response_format=FORMAT, stream=True)
    text = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert text == whole.choices[0].message.content
    form: Any = {"type": "json_schema", "name": "thing", "schema": SCHEMA}
    answer = client.responses.create(model="talker", input="ab", text={"format": form})
    assert valid(answer.output_text)


@pytest.mark.parametrize(
    ("fields", "expression"),
    [
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"guided_json": {"enum": ["a", 1]}}, '"a"|1'),
        ({"structured_outputs": {"regex": "[cd]{2}"}}, "[cd]{2}"),
        ({"response_format": {"type": "regex", "pattern": "e|f"}}, "e|f"),
    ],
)
def test_the_fields_of_vllm_are_taken(
    client: openai.OpenAI, fields: dict[str, Any], expression: str
) -> None:
    found = client.completions.create(model="talker", prompt="ab", extra_body=fields)
    assert re.fullmatch(expression, found.choices[0].text)
    chat = client.chat.completions.create(model="talker", messages=HELLO, extra_body=fields)
    assert re.fullmatch(expression, chat.choices[0].message.content or "")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}]
)
def test_a_needed_tool_is_called_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 1,
        "temperature": 1.0,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    (call,) = whole.message.tool_calls or []
    assert isinstance(choice, str) or call.function.name == "paint"
    assert call.function.name == "stop" or valid(call.function.arguments)
    name, arguments, reasons = "", "", set()
    for piece in client.chat.completions.create(**asked, stream=True):
        reasons.add(piece.choices[0].finish_reason)
        assert not piece.choices[0].delta.content
        for part in piece.choices[0].delta.tool_calls or []:
            assert part.function is not None and part.index == 0
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)
    assert reasons == {None, "tool_calls"}
    # the conversation goes on with the result
    turns = [*HELLO, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    more = client.chat.completions.create(
        model="talker", messages=turns, tools=TOOLS, tool_choice="none", max_tokens=5
    )
    assert more.choices[0].finish_reason in ("stop", "length")


def test_tools_that_need_not_be_called_leave_text_alone(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "messages": HELLO,
        "tools": TOOLS,
        "max_tokens": 9,
        "temperature": 0,
    }
    found = client.chat.completions.create(**asked).choices[0]
    pieces = client.chat.completions.create(**asked, stream=True)
    assert found.message.tool_calls is None
    text = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert text == found.message.content


def test_an_answer_of_a_schema_may_be_a_call(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "messages": HELLO,
        "tools": TOOLS,
        "temperature": 9.0,
    }
    found = {
        client.chat.completions.create(**asked, response_format=FORMAT, seed=seed, max_tokens=200)
        .choices[0]
        .finish_reason
        for seed in range(12)
    }
    assert {"stop", "tool_calls"} <= found


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"response_format": {"type": "jsn"}}, "response_format", "has the type text"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs a schema"),
    ({"guided_regex": "("}, None, "unclosed group"),
    ({"guided_json": {"enum": []}}, None, "Unsatisfiable schema"),
    ({"guided_json": "{"}, "guided_json", "is JSON"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "of one language"),
    ({"guided_regex": "a", "ignore_eos": True}, None, "ignore_eos must be False"),
    ({"guided_regex": "a+", "logit_bias": {}, "bad_words": ["a"]}, None, "ban every token"),
    ({"tools": [{"type": "search"}]}, "tools", "a tool is"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "tool_choice is"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "said"), BAD)
def test_what_cannot_be_is_400_before_any_stream(
    server: Started, fields: dict[str, Any], param: str | None, said: str, stream: bool
) -> None:
    body = {"model": "talker", "messages": HELLO, "stream": stream, **fields}
    with httpx.Client(base_url=server[0], timeout=30) as web:
        found = web.post("/v1/chat/completions", json=body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert re.search(said, error["message"]) and error["param"] == param
    assert quiet(server[1]["talker"])


def test_company_changes_no_answer_and_a_failure_is_one_request_s(
    server: Started, client: openai.OpenAI
) -> None:
    llm = LLM(talker())
    letter = [tiny_tokenizer().encode("a")[0]]
    fields: list[dict[str, Any]] = [
        {"guided_regex": "[ab]{2,9}c", "seed": 4},
        {"guided_json": SCHEMA, "seed": 4},
        {
            "guided_regex": "a+",
            "logit_bias": {str(letter[0]): -100},
            "bad_words": ["aa", "aaa", "ab"],
        },
        {"seed": 4},
    ]

    def answer(given: dict[str, Any]) -> str | int:
        try:
            made = client.completions.create(
                model="talker", prompt="ab", temperature=1.0, max_tokens=20, extra_body=given
            )
            return made.choices[0].text
        except openai.BadRequestError as error:
            return error.status_code

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answer, fields * 4))
    assert found == found[:4] * 4 and found[2] == 400
    grammars = [Grammar.regex("[ab]{2,9}c"), Grammar.json_schema(SCHEMA), None]
    for text, grammar in zip((found[0], found[1], found[3]), grammars, strict=True):
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=4, grammar=grammar)
        assert llm.generate("ab", params)[0].text == text
    assert quiet(server[1]["talker"])
