"""Tools at /v1/responses: items and events as the official client reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_server import quiet, running, talker
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.llm import LLM
from linspec.serve.response_items import Event, Items
from linspec.serve.schemas.responses import FunctionCall, InputMessage, as_turns
from linspec.serve.tool_calls import ToolTurn
from linspec.serve.tools import Choice, read_tools
from linspec.serve.worker import Worker

Started = tuple[str, dict[str, Worker]]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["red", "green"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "stop", "parameters": {"additionalProperties": False}},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    with running({"talker": LLM(talker(), max_batch=4)}) as started:
        yield started


@pytest.fixture
def client(server: Started) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "paint"}])
def test_a_needed_tool_is_called_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "input": "ab cd",
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    whole = client.responses.create(**asked)
    (call,) = whole.output
    assert call.type == "function_call" and whole.status == call.status == "completed"
    assert whole.tool_choice == choice or whole.tool_choice.name == "paint"
    assert [tool.name for tool in whole.tools] == ["paint", "stop"]
    assert call.name == "stop" or json.loads(call.arguments)["kind"] in ("red", "green")
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        last = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    arguments = "".join(
        event.delta for event in events if event.type == "response.function_call_arguments.delta"
    )
    (streamed,) = last.output
    assert streamed.type == "function_call"
    assert (
        (streamed.name, streamed.arguments)
        == (call.name, arguments)
        == (
            call.name,
            call.arguments,
        )
    )


@pytest.mark.parametrize("tokens", [1, 10, 30, 48])
def test_an_answer_that_is_cut_is_incomplete_wherever_it_is(
    client: openai.OpenAI, tokens: int
) -> None:
    found = client.responses.create(
        model="talker",
        input="ab",
        tools=TOOLS[:1],
        tool_choice="required",
        max_output_tokens=tokens,
    )
    assert found.status == found.output[-1].status == "incomplete"
    assert found.output[-1].type == ("function_call" if tokens == 48 else "message")
    assert found.incomplete_details.reason == "max_output_tokens"


def test_what_was_called_and_came_of_it_goes_back_as_it_does_in_a_chat(
    client: openai.OpenAI,
) -> None:
    asked: dict[str, Any] = {"model": "talker", "tools": TOOLS, "temperature": 0}
    first: Any = {"role": "user", "content": "ab"}
    called = client.responses.create(input=[first], tool_choice="required", **asked)
    calls: Any = [item for item in called.output if item.type == "function_call"]
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        for call in calls
    ]
    more = client.responses.create(
        input=[first, *called.output, *results], max_output_tokens=3, **asked
    )
    turns: Any = [
        first,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ],
        },
        *({"role": "tool", "tool_call_id": c.call_id, "content": "done"} for c in calls),
    ]
    known: Any = [{"type": "function", "function": tool} for tool in TOOLS]
    chat = client.chat.completions.create(
        model="talker", messages=turns, tools=known, max_tokens=3, temperature=0
    )
    assert more.usage.input_tokens == chat.usage.prompt_tokens
    assert more.output_text == chat.choices[0].message.content


def test_text_and_calls_in_a_row_are_one_turn() -> None:
    calls = [
        FunctionCall(type="function_call", call_id=each, name="stop", arguments="{}")
        for each in "ab"
    ]
    turns = as_turns([InputMessage(role="assistant", content="so"), *calls])
    (turn,) = turns
    assert turn["content"] == "so" and [each["id"] for each in turn["tool_calls"]] == ["a", "b"]


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools", "a tool is"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "tool_choice is"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"input": [{"type": "reasoning"}]}, "input.0", "^input.0: an input is an object .*function"),
    ({"input": [5]}, "input.0", "^input.0: an input is an object"),
    (
        {"input": [{"type": "function_call", "call_id": "a", "name": "b"}]},
        "input.0.arguments",
        "^input.0.arguments is missing",
    ),
    (
        {"input": [{"type": "function_call_output", "call_id": "a", "output": [5]}]},
        "input.0.output.0",
        "^input.0.output.0: ",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "said"), BAD)
def test_what_cannot_be_is_400_before_any_stream(
    server: Started, fields: dict[str, Any], param: str | None, said: str, stream: bool
) -> None:
    body = {"model": "talker", "input": "ab", "stream": stream, **fields}
    with httpx.Client(base_url=server[0], timeout=30) as web:
        found = web.post("/v1/responses", json=body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert re.search(said, error["message"]) and error["param"] == param, error
    assert quiet(server[1]["talker"])


CALL = '<tool_call>[{"name": "paint", "arguments": {"kind": "red"}}]</tool_call>'
PARTS = st.sampled_from(
    [CALL, CALL[:30], "<tool_call>", '{"name": "stop", "arguments": {}}', "a b"]
)


def replayed(events: list[Event]) -> list[dict[str, Any]]:
    """The items that a client makes of the parts of a stream."""
    items: list[dict[str, Any]] = []
    for kind, event in events:
        assert event["output_index"] == len(items) - (kind != "output_item.added")
        if kind == "output_item.added":
            items.append(event["item"])
        elif kind == "content_part.added":
            items[-1]["content"].append(event["part"])
        elif kind == "output_text.delta":
            items[-1]["content"][0]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            items[-1]["arguments"] += event["delta"]
        elif kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert items[-1] == event["item"]
    return items


@settings(deadline=None)
@given(st.lists(PARTS, max_size=5), st.data(), st.sampled_from(["stop", "length"]))
def test_items_are_the_same_however_the_text_comes(
    parts: list[str], data: st.DataObject, reason: str
) -> None:
    def items() -> Items:
        return Items(ToolTurn(Choice.of("auto", read_tools(TOOLS))))

    text = "".join(parts)
    whole, pieces, events = items(), items(), list[Event]()
    events += whole.push(text) + whole.finish(reason)
    assert replayed(events) == [item.model_dump() for item in whole.output]
    events = []
    while text:
        size = data.draw(st.integers(1, len(text)))
        events += pieces.push(text[:size])
        text = text[size:]
    events += pieces.finish(reason)
    assert replayed(events) == [item.model_dump() for item in pieces.output]
    plain = {"id": True, "call_id": True}
    dumped = [[item.model_dump(exclude=plain) for item in each.output] for each in (whole, pieces)]
    assert dumped[0] == dumped[1]
    assert all(item["status"] == "completed" for item in dumped[0][:-1])


def test_a_call_that_an_end_cuts_is_not_completed() -> None:
    items = Items(ToolTurn(Choice.of("auto", read_tools(TOOLS))))
    name = read_tools(TOOLS)[0].name
    items.push(f'<tool_call>{{"name": "{name}", "arguments": {{"a": ')
    events = items.finish("stop")
    assert [item.status for item in items.output] == ["incomplete"]
    assert events[-1][1]["item"]["status"] == "incomplete"
    # an object that was no call is text, and whole
    items = Items(ToolTurn(Choice.of("auto", read_tools(TOOLS))))
    items.push('{"a": ')
    items.finish("stop")
    assert [item.status for item in items.output] == ["completed"]
