"""The API, through the official client and a real server."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from api_server import quiet, running, talker

from linspec.decoding.sampling import SamplingParams
from linspec.llm import LLM
from linspec.serve import failures
from linspec.serve.worker import Worker

HELLO: Any = [{"role": "user", "content": "ab cd"}]
Started = tuple[str, dict[str, Worker]]


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    llms = {
        "talker": LLM(talker(), max_batch=4, drafter="prompt-lookup"),
        "narrow": LLM(talker("softmax", 64), max_batch=2),
    }
    with running(llms) as started:
        yield started


@pytest.fixture
def llm(server: Started) -> LLM:
    return server[1]["talker"].llm


@pytest.fixture
def client(server: Started) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
def web(server: Started) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=30) as made:
        yield made


# ---- texts


@pytest.mark.parametrize("prompt", ["abcd", ["ab", "the end"], [5, 6, 7], [[5, 6], [7]]])
def test_completions_are_those_of_the_library(client: openai.OpenAI, llm: LLM, prompt: Any) -> None:
    found = client.completions.create(
        model="talker", prompt=prompt, max_tokens=9, temperature=0.8, seed=3, n=2
    )
    params = SamplingParams(max_tokens=9, temperature=0.8, seed=3, n=2)
    alone = [each for result in llm.generate(prompt, params) for each in result.outputs]
    assert [c.text for c in found.choices] == [a.text for a in alone]
    assert [c.index for c in found.choices] == list(range(len(alone)))
    assert [c.finish_reason for c in found.choices] == [a.finish_reason for a in alone]
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(len(a.token_ids) for a in alone)
    assert found.usage.prompt_tokens == sum(a.prompt_tokens for a in alone[::2])
    assert found.usage.linspec["tokens_per_round"] >= 1  # type: ignore[attr-defined]


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "prompt": ["ab", "cd"],
        "max_tokens": 12,
        "n": 2,
        "seed": 5,
        "logprobs": 2,
    }
    whole = client.completions.create(**asked)
    texts, logprobs, reasons = ["", "", "", ""], [[], [], [], []], {}
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
        if choice.logprobs:
            logprobs[choice.index] += choice.logprobs.token_logprobs
    assert texts == [c.text for c in whole.choices]
    assert [reasons[i] for i in range(4)] == [c.finish_reason for c in whole.choices]
    assert logprobs == [c.logprobs.token_logprobs for c in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_tells_in_every_chunk_how_many_tokens_there_are(
    web: httpx.Client, path: str, include_usage: bool
) -> None:
    prompt = {"prompt": ["ab", "cde"]} if path == "/v1/completions" else {"messages": HELLO}
    asked = {**prompt, "model": "talker", "max_tokens": 12, "n": 2, "seed": 5, "stop": "e"}
    whole = web.post(path, json=asked).json()["usage"]
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    got = web.post(path, json={**asked, "stream": True, "stream_options": options}).text
    chunks = [json.loads(line[6:]) for line in got.split("\n\n") if line.startswith("data: {")]
    told = [each["usage"] for each in chunks]
    assert {each["prompt_tokens"] for each in told} == {whole["prompt_tokens"]}
    assert all(e["total_tokens"] == e["prompt_tokens"] + e["completion_tokens"] for e in told)
    assert told[0]["completion_tokens"] < told[-1]["completion_tokens"]
    assert told[-1]["completion_tokens"] == whole["completion_tokens"]
    assert [each for each in chunks if not each["choices"]] == chunks[-1:] * include_usage


def test_echo_with_logprobs_tells_about_the_prompt(client: openai.OpenAI, llm: LLM) -> None:
    (choice,) = client.completions.create(
        model="talker", prompt="abcd end", max_tokens=0, echo=True, logprobs=1
    ).choices
    assert choice.text == "abcd end"
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    read = llm.generate("abcd end", params)[0].prompt_logprobs
    assert choice.logprobs.token_logprobs == pytest.approx([e and e.logprob for e in read])
    assert "".join(choice.logprobs.tokens) == "abcd end"
    assert choice.logprobs.text_offset[0] == 0


def test_best_of_returns_the_likeliest(client: openai.OpenAI, llm: LLM) -> None:
    (choice,) = client.completions.create(
        model="talker", prompt="ab", max_tokens=6, best_of=5, seed=1
    ).choices
    params = SamplingParams(max_tokens=6, n=5, seed=1, temperature=1.0, logprobs=0)
    outputs = llm.generate("ab", params)[0].outputs
    best = max(outputs, key=lambda o: sum(e.logprob for e in o.logprobs) / len(o.logprobs))
    assert choice.text == best.text


def test_stops_biases_and_penalties_arrive(client: openai.OpenAI, llm: LLM) -> None:
    (free,) = client.completions.create(
        model="talker", prompt="ab", max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    ).choices
    stop = free.text[3:5]
    (cut,) = client.completions.create(
        model="talker",
        prompt="ab",
        max_tokens=20,
        temperature=0,
        stop=[stop],
        extra_body={"ignore_eos": True},
    ).choices
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    first = llm.encode(free.text[4:6], add_special_tokens=False)[0]
    asked = SamplingParams(
        max_tokens=9, logit_bias={first: -math.inf, 7: 2.0}, presence_penalty=1.5, top_k=3
    )
    (biased,) = client.completions.create(
        model="talker",
        prompt="ab",
        max_tokens=9,
        temperature=0,
        logit_bias={str(first): -100, "7": 2},
        presence_penalty=1.5,
        extra_body={"top_k": 3},
    ).choices
    assert biased.text == llm.generate("ab", asked)[0].text


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_usage_of_a_stream_is_that_of_the_whole_answer_whichever_choice_ends_first(
    web: httpx.Client, kind: str
) -> None:
    # long enough that the first sequence reads it for the others
    prompt = "ab cd " * 40
    path, asked = "/v1/completions", dict[str, Any](prompt=prompt)
    if kind == "chat":
        path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}
    late = 0
    for seed in range(8):
        body = {**asked, "model": "talker", "max_tokens": 9, "seed": seed, "n": 4, "stop": ["a"]}
        whole = web.post(path, json=body).json()
        more = {"stream": True, "stream_options": {"include_usage": True}}
        lines = web.post(path, json=body | more).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        ended = [c["index"] for k in chunks for c in k["choices"] if c["finish_reason"]]
        late += ended[0] != 0
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert (
            chunks[-1]["usage"]["prompt_tokens_details"] == whole["usage"]["prompt_tokens_details"]
        )
    assert late


def test_tokens_that_are_parts_of_a_character_keep_their_own_entries_and_places(
    client: openai.OpenAI,
) -> None:
    text = "a\U0001f642b\u00e9"
    found = client.completions.create(
        model="talker", prompt=text, max_tokens=0, echo=True, logprobs=20
    )
    logprobs = found.choices[0].logprobs
    bytes_of = [f"bytes:\\x{each:02x}" for each in text[1].encode() + text[3].encode()]
    assert logprobs.tokens == ["a", *bytes_of[:4], "b", *bytes_of[4:]]
    assert logprobs.text_offset == [0, 1, 1, 1, 1, 2, 3, 3]
    # each of the likeliest is there, whatever it reads like
    assert all(len(each) >= 20 for each in logprobs.top_logprobs[1:])
    assert not any("\ufffd" in name for each in logprobs.top_logprobs[1:] for name in each)


@pytest.mark.parametrize("stream", [False, True])
def test_no_offset_runs_past_the_end_of_the_text(web: httpx.Client, stream: bool) -> None:
    for seed in range(6):
        body = {"model": "talker", "prompt": "ab", "max_tokens": 30, "seed": seed, "logprobs": 0}
        body |= {"logit_bias": {"0": 5}, "temperature": 1.5, "stream": stream}
        answer = web.post("/v1/completions", json=body).text
        lines = [line[6:] for line in answer.splitlines() if line.startswith("data: {")]
        found = [json.loads(each)["choices"][0] for each in (lines if stream else [answer])]
        text = "".join(each["text"] for each in found)
        offsets = [
            at for each in found if each["logprobs"] for at in each["logprobs"]["text_offset"]
        ]
        assert offsets and offsets == sorted(offsets) and offsets[-1] <= len(text)


# ---- conversations


def test_chat_is_that_of_the_library(client: openai.OpenAI, llm: LLM) -> None:
    found = client.chat.completions.create(
        model="talker",
        messages=HELLO,
        max_completion_tokens=7,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    (alone,) = llm.chat(HELLO, SamplingParams(max_tokens=7, logprobs=2))
    (choice,) = found.choices
    assert choice.message.content == alone.text and choice.message.role == "assistant"
    assert choice.finish_reason == alone.finish_reason
    assert [e.logprob for e in choice.logprobs.content] == [e.logprob for e in alone.logprobs]
    assert all(len(e.top_logprobs) == 2 for e in choice.logprobs.content)
    assert found.usage.prompt_tokens == alone.prompt_tokens
    assert found.usage.prompt_tokens_details.cached_tokens == 0


def test_bytes_of_tokens_join_to_the_text_where_tokens_are_parts_of_characters(
    client: openai.OpenAI, llm: LLM
) -> None:
    smile = llm.encode("\U0001f642", add_special_tokens=False)
    (choice,) = client.chat.completions.create(
        model="talker",
        messages=HELLO,
        max_tokens=40,
        logprobs=True,
        top_logprobs=3,
        seed=1,
        logit_bias={**{str(token): 4 for token in smile}, "0": -100},
    ).choices
    given = [bytes(each.bytes or ()) for each in choice.logprobs.content]
    assert any(each[0] >= 0x80 for each in given)
    # what is no character reads as a replacement in the text, and its bytes are told all the same
    assert b"".join(given).decode("utf-8", "replace") == choice.message.content


def test_chat_streams_what_it_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, *HELLO],
        "max_tokens": 15,
        "seed": 2,
        "n": 3,
    }
    whole = client.chat.completions.create(**asked)
    texts = ["", "", ""]
    roles, reasons, usage = set(), {}, None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                roles.add((choice.index, choice.delta.role))
            reasons[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in whole.choices]
    assert roles == {(0, "assistant"), (1, "assistant"), (2, "assistant")}
    assert [reasons[i] for i in range(3)] == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage


def test_responses_whole_and_streamed(client: openai.OpenAI, llm: LLM) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "instructions": "be brief",
        "input": HELLO,
        "max_output_tokens": 9,
        "temperature": 0,
    }
    (alone,) = llm.chat(
        [{"role": "system", "content": "be brief"}, *HELLO], SamplingParams(max_tokens=9)
    )
    whole = client.responses.create(**asked)
    assert whole.output_text == alone.text and whole.usage.output_tokens == len(alone.token_ids)
    events = list(client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == alone.text
    assert events[-1].response.output_text == alone.text
    assert events[-1].type == f"response.{whole.status}"
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
    assert kinds == [e.type for e in events]


def test_a_text_is_an_input_too(client: openai.OpenAI, llm: LLM) -> None:
    found = client.responses.create(
        model="talker", input="ab cd", temperature=0, max_output_tokens=5
    )
    assert found.output_text == llm.chat(HELLO, SamplingParams(max_tokens=5))[0].text


# ---- tools and forms

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_needed_call_comes_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "messages": HELLO,
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "temperature": 0,
    }
    (whole,) = client.chat.completions.create(**asked).choices
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather" and whole.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    name, arguments, reasons = "", "", []
    for chunk in client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            name += part.function.name or ""
            arguments += part.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (name, arguments) == ("weather", call.function.arguments)
    assert reasons[-1] == "tool_calls"


def test_calls_and_their_results_go_back_into_the_prompt(client: openai.OpenAI) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]
    found = client.chat.completions.create(model="talker", messages=turns, max_tokens=2)
    plain = client.chat.completions.create(model="talker", messages=HELLO, max_tokens=2)
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens + 10


def test_outputs_have_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (choice,) = client.chat.completions.create(
        model="talker", messages=HELLO, response_format=form, max_tokens=40
    ).choices
    assert json.loads(choice.message.content)["a"] in (1, 2)
    (text,) = client.completions.create(
        model="talker", prompt="ab", max_tokens=40, extra_body={"guided_choice": ["yes", "no"]}
    ).choices
    assert text.text in ("yes", "no")
    told: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    found = client.responses.create(model="talker", input="ab", text=told)
    assert json.loads(found.output_text)["a"] in (1, 2)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_shows_its_drafts(web: httpx.Client, path: str) -> None:
    body: dict[str, Any] = {
        "model": "talker",
        "max_tokens": 30,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_drafts": True},
        **({"prompt": "ab"} if path == "/v1/completions" else {"messages": HELLO}),
    }
    lines = web.post(path, json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
    told = [c["linspec"] for c in choices if "linspec" in c]
    assert "".join(part["text"] for each in told for part in each["parts"]) == text
    assert sum(each["tokens"] for each in told) == 30
    assert told[-1]["totals"]["rounds"] >= 1


# ---- the rest


def test_there_is_a_page_with_metrics_and_live_figures(web: httpx.Client) -> None:
    assert "<html" in web.get("/").text
    assert web.get("/page/app.js").status_code == 200
    web.post("/v1/completions", json={"model": "narrow", "prompt": "ab", "max_tokens": 2})
    assert 'linspec:generation_tokens_total{model_name="narrow"}' in web.get("/metrics").text
    assert set(web.get("/linspec/loads").json()["models"]) == {"talker", "narrow"}


def test_models_tokens_and_health(client: openai.OpenAI, web: httpx.Client, llm: LLM) -> None:
    assert [each.id for each in client.models.list()] == ["talker", "narrow"]
    assert client.models.retrieve("narrow").max_model_len == 64  # type: ignore[attr-defined]
    tokens = web.post("/tokenize", json={"model": "talker", "prompt": "the end é"}).json()
    assert tokens["tokens"] == llm.encode("the end é") and tokens["count"] == len(tokens["tokens"])
    back = web.post("/detokenize", json={"model": "talker", "tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "the end é"}
    turned = web.post("/tokenize", json={"model": "talker", "messages": HELLO}).json()["tokens"]
    assert turned == llm.encoder.chat(HELLO)
    for path in ("/health", "/ready", "/version"):
        assert web.get(path).status_code == 200


def test_a_request_has_an_id(web: httpx.Client) -> None:
    named = web.get("/health", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    made = {
        web.get("/health", headers={"x-request-id": 'a"b'}).headers["x-request-id"] for _ in "ab"
    }
    assert len(made) == 2 and all(each.startswith("req-") for each in made)


BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", {"model": "none", "prompt": "a"}, 404, "no model none"),
    ("/v1/completions", {"prompt": "a"}, 404, "no model is named"),
    ("/v1/completions", {"model": "talker"}, 400, "prompt is missing"),
    ("/v1/completions", {"model": "talker", "prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"model": "talker", "prompt": []}, 400, "prompt"),
    ("/v1/completions", {"model": "talker", "prompt": [10**6]}, 400, "1000000"),
    ("/v1/completions", {"model": "talker", "prompt": "\ud800"}, 400, "^prompt: .*valid string"),
    ("/v1/completions", {"model": "\ud800", "prompt": "a"}, 404, "ud800"),
    ("/v1/completions", {"model": "talker", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"model": "talker", "prompt": "a", "max_tokens": 9999}, 400, "9999.*4096"),
    (
        "/v1/completions",
        {"model": "talker", "prompt": "a", "n": 2, "temperature": 0},
        400,
        "n must",
    ),
    ("/v1/completions", {"model": "talker", "prompt": "a", "top_p": 2}, 400, "top_p.*got 2"),
    ("/v1/completions", {"model": "talker", "prompt": "a", "top_p": "1"}, 400, "top_p"),
    ("/v1/completions", {"model": "talker", "prompt": "a", "topp": 1}, 400, "topp is not known"),
    ("/v1/completions", {"model": "talker", "prompt": "a", "best_of": 1, "n": 2}, 400, "best_of"),
    (
        "/v1/completions",
        {"model": "talker", "prompt": "a", "logit_bias": {"999999": 1}},
        400,
        "999999",
    ),
    (
        "/v1/completions",
        {"model": "talker", "prompt": "a", "guided_grammar": "x"},
        400,
        "the grammar .*cannot be used",
    ),
    ("/v1/completions", {"model": "narrow", "prompt": "a b " * 50}, 400, "200.*64|64.*200"),
    (
        "/v1/chat/completions",
        {"model": "narrow", "messages": [{"role": "user", "content": "x" * 99}]},
        400,
        r"\d+.*64",
    ),
    ("/v1/responses", {"model": "narrow", "input": "x" * 99}, 400, r"\d+.*64"),
    ("/v1/chat/completions", {"model": "talker", "messages": []}, 400, "messages"),
    (
        "/v1/chat/completions",
        {"model": "talker", "messages": [{"role": "x", "content": ""}]},
        400,
        "role",
    ),
    (
        "/v1/chat/completions",
        {"model": "talker", "messages": [{"role": "user", "content": None}]},
        400,
        "messages.0: .*needs content",
    ),
    (
        "/v1/chat/completions",
        {"model": "talker", "messages": [{"role": "user", "content": "hush"}]},
        400,
        "no such turn",
    ),
    (
        "/v1/chat/completions",
        {"model": "talker", "messages": HELLO, "top_logprobs": 1},
        400,
        "logprobs",
    ),
    (
        "/v1/chat/completions",
        {"model": "talker", "messages": HELLO, "chat_template": "x"},
        400,
        "chat_template",
    ),
    (
        "/v1/responses",
        {"model": "talker", "input": "a", "previous_response_id": "x"},
        400,
        "previous",
    ),
    ("/v1/embeddings", {"model": "talker", "input": "a"}, 400, "no embeddings"),
    ("/detokenize", {"model": "talker", "tokens": [10**6]}, 400, "1000000"),
    ("/tokenize", {"model": "talker"}, 400, "one of prompt and messages"),
]


@pytest.mark.crossed(3)
@pytest.mark.parametrize(("path", "body", "status", "said"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_their_status_before_any_stream(
    web: httpx.Client, path: str, body: Any, status: int, said: str, stream: bool
) -> None:
    if stream and path.startswith("/v1/") and "embeddings" not in path:
        body = {**body, "stream": True}
    sent = json.dumps(body).encode("ascii")
    got = web.post(path, content=sent, headers={"content-type": "application/json"})
    assert got.status_code == status, got.text
    error = got.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(said, error["message"], re.S), error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000, b"null", b"3", b"NaN"],
)
def test_what_is_no_json_is_a_400(web: httpx.Client, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
        got = web.post(path, content=content, headers={"content-type": "application/json"})
        assert got.status_code == 400, got.text
        assert got.json()["error"]["type"] == "invalid_request_error"


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}
# of a field that takes several forms, the error is about the one that was sent
FORMS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": []}, "^prompt: List should have at least 1 item"),
    ("/v1/completions", {"prompt": [[]]}, "^prompt.0: List should have at least 1 item"),
    ("/v1/completions", {"prompt": ["a", ""]}, "^prompt.1: String should have at least 1"),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 65}, "^stop: List should have at most 64"),
    ("/v1/completions", {"prompt": "a", "stop": ["x", ""]}, "^stop.1: String should have at least"),
    ("/v1/completions", {"prompt": 5}, "^prompt: Input should be a valid string"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "^suffix is not served"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        r"^messages.0.content.0.type: Input should be 'text', got 'image_url'",
    ),
    ("/v1/responses", {"input": []}, "^input: List should have at least 1 item"),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "^input.0.content.0.type: Input should be 'input_text'.*got 'input_image'",
    ),
    ("/v1/responses", {"input": "a", "previous_response_id": "x"}, "response_id is not served"),
]


@pytest.mark.parametrize(("path", "body", "said"), FORMS)
def test_an_error_is_about_the_form_that_was_sent(
    web: httpx.Client, path: str, body: Any, said: str
) -> None:
    got = web.post(path, json={"model": "talker", **body})
    assert got.status_code == 400
    assert re.search(said, got.json()["error"]["message"]), got.text


# below what the door of bodies refuses
MANY = 80_000
FLOODS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": [{}] * MANY}),
    ("/v1/completions", {"prompt": "a", "stop": [5] * MANY}),
    ("/v1/completions", {"prompt": "a", "bad_words": [5] * MANY}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(MANY)}}),
    ("/v1/completions", {"prompt": "a", "metadata": {f"x{i}": 1 for i in range(MANY)}}),
    ("/v1/completions", {"prompt": "a", **{f"x{i}": 1 for i in range(MANY)}}),
    ("/v1/chat/completions", {"messages": [0] * MANY}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * MANY}]}),
    ("/v1/responses", {"input": [0] * MANY}),
    ("/v1/embeddings", {"input": [{}] * MANY}),
    ("/tokenize", {"messages": [0] * MANY}),
    ("/detokenize", {"tokens": ["a"] * MANY}),
    # right, and far too many
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * MANY}),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [{"name": "a"}] * MANY}),
    ("/v1/completions", {"prompt": "a", "bad_words": ["a"] * MANY}),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [5] * MANY}),
    ("/v1/completions", {"prompt": "a", "guided_choice": ["a"] * MANY}),
]


@pytest.mark.parametrize(("path", "body"), FLOODS)
def test_a_body_that_is_wrong_everywhere_holds_nobody_up(
    web: httpx.Client, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counted(errors: Sequence[Any]) -> failures.Failure:
        counts.append(len(errors))
        return told(errors)

    told = failures._of_validation
    monkeypatch.setattr(failures, "_of_validation", counted)
    assert web.post(path, json=body).status_code == 400
    assert counts and counts[0] <= 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_json_without_its_header_is_told_of_the_header(web: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings"):
        got = web.post(path, content=b'{"model": "talker", "prompt": "a"}', headers=headers)
        assert got.status_code == 400
        assert "'Content-Type: application/json'" in got.json()["error"]["message"]


def test_unknown_paths_and_methods(web: httpx.Client) -> None:
    assert "nothing at /v2; /docs" in web.get("/v2").json()["error"]["message"]
    # the usual mistake with a client's base URL
    for path in ("/chat/completions", "/models"):
        got = web.post(path, json={})
        assert got.status_code == 404
        assert f"/v1{path} is what you want" in got.json()["error"]["message"]
    assert web.get("/v1/completions").status_code == 405
    assert web.get("/v1/models/none").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_balancer_that_asks_for_the_head_alone_is_answered(web: httpx.Client, path: str) -> None:
    got = web.head(path)
    assert got.status_code == 200 and not got.content


def test_a_megabyte_of_prompt_is_a_400_with_both_numbers(web: httpx.Client) -> None:
    got = web.post("/v1/completions", json={"model": "narrow", "prompt": "ab cd " * 170_000})
    assert got.status_code == 400
    assert "64" in got.json()["error"]["message"]


def test_the_client_raises_the_right_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context|takes 64") as caught:
        client.completions.create(model="narrow", prompt="a b " * 50)
    assert caught.value.code == "context_length_exceeded"


def test_an_unsatisfiable_request_fails_alone(web: httpx.Client, llm: LLM) -> None:
    bias = {str(token): -100 for token in range(llm.model.config.vocab_size)}
    for stream in (False, True):
        body = {"model": "talker", "prompt": "a", "logit_bias": bias, "stream": stream}
        got = web.post("/v1/completions", json=body)
        assert got.status_code == 400
        assert "ban every token" in got.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_slots(server: Started, web: httpx.Client) -> None:
    worker = server[1]["talker"]
    body = {"model": "talker", "prompt": "ab", "max_tokens": 4000, "ignore_eos": True}
    for _ in range(4):
        with web.stream("POST", "/v1/completions", json={**body, "n": 2, "stream": True}) as got:
            next(got.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            web.post("/v1/completions", json=body, timeout=0.05)
    assert quiet(worker)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_mix_of_clients_gets_what_each_gets_alone(
    server: Started, client: openai.OpenAI, llm: LLM, seed: int
) -> None:
    rng = random.Random(seed)

    def any_request() -> dict[str, Any]:
        return {
            "model": "talker",
            "prompt": "abcd end"[: rng.randrange(1, 9)] * rng.randrange(1, 6),
            "max_tokens": rng.randrange(1, 16),
            "temperature": rng.choice((0, 0.7, 1)),
            "seed": rng.randrange(50),
            "frequency_penalty": rng.choice((0, 0.5)),
            "stop": rng.choice((None, ["b"])),
        }

    def text(asked: dict[str, Any]) -> str:
        return client.completions.create(**asked).choices[0].text

    def streamed(asked: dict[str, Any]) -> str:
        stream = client.completions.create(**asked, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    asked = [any_request() for _ in range(24)]
    with ThreadPoolExecutor(24) as pool:
        ways = [streamed if at % 2 else text for at in range(len(asked))]
        together = list(pool.map(lambda way, each: way(each), ways, asked))
    assert together == [text(each) for each in asked]
    assert quiet(server[1]["talker"])
