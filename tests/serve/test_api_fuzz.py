"""Bodies of every kind at every endpoint: the OpenAPI page has the answer, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import quiet, running, talker
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.llm import LLM
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker

HELLO = [{"role": "user", "content": "ab"}]
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 3},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3},
    "/v1/responses": {"input": "ab", "max_output_tokens": 3},
    "/v1/embeddings": {"input": "ab"},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [5]},
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 3)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["", "a", "text", "\ud800", "\0", "none", "auto", "x" * 300])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[httpx.Client, Worker, dict[str, Any]]]:
    limits = Settings.read(None, max_tokens=20, max_prompt_tokens=200, queue_limit=300)
    with (
        running({"talker": LLM(talker(), max_batch=4)}, limits) as (address, workers),
        httpx.Client(base_url=address, timeout=60) as web,
    ):
        page = web.get("/openapi.json").json()
        yield web, workers["talker"], page


def fields(page: dict[str, Any], path: str) -> list[str]:
    """The fields that the page says a body has."""
    asked = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = asked["$ref"].rpartition("/")[2]
    return sorted(page["components"]["schemas"][name]["properties"])


@pytest.mark.parametrize("path", VALID)
@settings(max_examples=settings().max_examples * 3)
@given(data=st.data())
def test_any_body_gets_an_answer_that_the_page_has(
    server: tuple[httpx.Client, Worker, dict[str, Any]], path: str, data: st.DataObject
) -> None:
    web, _, page = server
    known = fields(page, path)
    assert set(VALID[path]) <= set(known)
    names = st.sampled_from(known) | st.text(max_size=5)
    changes = data.draw(st.dictionaries(names, values, max_size=3))
    body = json.dumps({**VALID[path], **changes}).encode("ascii")
    got = web.post(path, content=body, headers={"content-type": "application/json"})
    assert got.status_code in (200, 400, 404), (body, got.text)
    assert str(got.status_code) in page["paths"][path]["post"]["responses"]
    if got.status_code != 200:
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}, got.text


@pytest.mark.parametrize("path", VALID)
@settings(max_examples=settings().max_examples * 30 // 20)
@given(content=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode("ascii")))
def test_any_bytes_get_an_answer(
    server: tuple[httpx.Client, Worker, dict[str, Any]], path: str, content: bytes
) -> None:
    got = server[0].post(path, content=content, headers={"content-type": "application/json"})
    assert got.status_code in (400, 404), (content, got.text)
    assert got.json()["error"]["message"]


def test_nothing_is_left_and_the_server_is_well(
    server: tuple[httpx.Client, Worker, dict[str, Any]],
) -> None:
    web, worker, _ = server
    assert quiet(worker)
    for path, body in VALID.items():
        expected = 400 if path == "/v1/embeddings" else 200
        assert web.post(path, json=body).status_code == expected
    assert web.get("/health").status_code == 200
