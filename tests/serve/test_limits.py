"""Clients that send slowly, too much, no HTTP, or read nothing: each is answered, and none is kept."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from api_server import running, talker
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.llm import LLM
from linspec.serve.body import MOST_VALUES, Values
from linspec.serve.connection import limited
from linspec.serve.run import listening
from linspec.serve.settings import Settings

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SECONDS = 0.4


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running({"talker": LLM(talker())}, Settings.read(None)) as started:
        yield started[0]


@pytest.fixture(scope="module")
def hasty() -> Iterator[str]:
    """A server that waits a moment for a request: for tests of that limit alone."""
    with running({"talker": LLM(talker())}, Settings.read(None, body_seconds=SECONDS)) as started:
        yield started[0]


@pytest.fixture
def link(address: str) -> Iterator[socket.socket]:
    with connected(address) as made:
        yield made


@pytest.fixture
def hasty_link(hasty: str) -> Iterator[socket.socket]:
    with connected(hasty) as made:
        yield made


def connected(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def all_of(link: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while part := link.recv(2**16):
        found += part
    return found


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"connection: close" in head.lower()
    if b"transfer-encoding: chunked" in head.lower():
        body = body.partition(b"\r\n")[2].partition(b"\r\n")[0]
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"content-length: 100\r\n\r\n" + b'{"prompt": ',
        HEAD + b"content-length: 100\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{    \r\n",
        HEAD,
        b"POST /v1/comp",
    ],
)
def test_half_a_request_is_a_408_and_the_connection_ends(
    hasty_link: socket.socket, sent: bytes
) -> None:
    hasty_link.sendall(sent)
    error = error_of(all_of(hasty_link), 408)
    assert error["code"] == "body_timeout" and "--body-seconds" in error["message"]


@pytest.mark.parametrize("hidden", [b"", b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_no_second_request_hides_behind_two_lengths(link: socket.socket, hidden: bytes) -> None:
    """The rest of the body was read as the next request of the same connection."""
    both = b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(hidden))
    link.sendall(HEAD + both + hidden)
    answer = all_of(link)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert error_of(answer, 400)["code"] == "invalid_http"


def test_a_body_that_drips_is_a_408(hasty_link: socket.socket) -> None:
    hasty_link.sendall(HEAD + b"content-length: 1000\r\n\r\n")
    begun = time.monotonic()

    def drip() -> None:
        while time.monotonic() < begun + 5 * SECONDS:
            try:
                hasty_link.sendall(b" ")
            except OSError:
                return
            time.sleep(SECONDS / 10)

    dripping = threading.Thread(target=drip)
    dripping.start()
    # its end may be torn off by what is still sent
    assert hasty_link.recv(2**16).startswith(b"HTTP/1.1 408 ")
    dripping.join()
    assert time.monotonic() - begun < 10


def test_a_connection_that_asks_for_nothing_ends(hasty_link: socket.socket) -> None:
    assert all_of(hasty_link) == b""


def test_a_connection_that_sends_on_behind_a_refusal_ends(hasty: str) -> None:
    with connected(hasty) as link:
        link.sendall(HEAD + b"content-length: 999999999\r\n\r\n")
        assert link.recv(2**16).startswith(b"HTTP/1.1 413 ")
        begun = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012
            while time.monotonic() < begun + 10:
                link.sendall(b" " * 100)
                time.sleep(SECONDS / 10)


def test_a_slow_answer_is_not_cut_by_the_limit_of_its_body(hasty: str) -> None:
    body = {"prompt": "ab", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{hasty}/v1/completions", json=body) as got:
        begun, lines = time.monotonic(), got.iter_lines()
        while time.monotonic() < begun + 2 * SECONDS:
            assert "error" not in next(lines)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (
            b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: " + b"a" * 2**14 + b"\r\n\r\n",
            431,
        ),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 2**20 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 2**17 + b"\r\n", 431),
        (b"GET /" + b"a" * 2**18 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (HEAD + b"content-length: -5\r\n\r\n", 400),
        (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
        (HEAD + b"transfer-encoding: gzip\r\n\r\n", 501),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nno length\r\n", 400),
    ],
)
def test_what_is_no_http_is_told_so_in_json(
    link: socket.socket, sent: bytes, status: int, address: str
) -> None:
    # a server that refuses does not read what is left
    threading.Thread(target=quietly_sent, args=(link, sent), daemon=True).start()
    answer = b""
    try:
        while part := link.recv(2**16):
            answer += part
    except ConnectionResetError:
        pass
    assert answer.startswith(b"HTTP/1.1 %d " % status) or (len(sent) > 2**17 and not answer)
    if answer:
        assert error_of(answer, status)["code"] == "invalid_http"
    assert httpx.get(f"{address}/health").status_code == 200


def quietly_sent(link: socket.socket, sent: bytes) -> None:
    try:
        link.sendall(sent)
    except OSError:
        return


FLOODS = {
    "ids": b'{"tokens": [' + b"5," * 4_000_000 + b"5]}",
    "lists": b'{"prompt": [' + b"[]," * 2_600_000 + b"[]]}",
    "objects": b'{"messages": [' + b"{}," * 2_600_000 + b"{}]}",
    "depth": b"[" * 8_000_000,
    "names": b"{" + b'"":0,' * 1_500_000 + b'"":0}',
}


@pytest.mark.parametrize("name", FLOODS)
@pytest.mark.parametrize("path", ["/detokenize", "/v1/completions", "/v1/embeddings"])
def test_a_body_of_millions_of_values_is_refused_before_it_is_read(
    address: str, path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr("starlette.requests.Request.json", lambda _: read.append(1))
    headers = {"content-type": "application/json"}
    got = httpx.post(f"{address}{path}", content=FLOODS[name], headers=headers, timeout=30)
    assert got.status_code == 413 and not read
    assert str(MOST_VALUES) in got.json()["error"]["message"]


def test_a_text_of_commas_is_no_flood(address: str) -> None:
    text = ',[{"\\' * 100_000
    got = httpx.post(f"{address}/tokenize", json={"prompt": text}, timeout=60)
    assert got.status_code == 200 and got.json()["count"] > 100_000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-7"])
def test_json_that_is_not_utf_8_is_a_400(address: str, encoding: str) -> None:
    body = json.dumps({"prompt": "é"}, ensure_ascii=False).encode(encoding)
    headers = {"content-type": f"application/json; charset={encoding}"}
    got = httpx.post(f"{address}/tokenize", content=body, headers=headers)
    assert got.status_code == (200 if encoding == "utf-7" else 400), got.text


def test_a_compressed_body_is_a_400(address: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    body = gzip.compress(b'{"prompt": "a"}')
    assert httpx.post(f"{address}/tokenize", content=body, headers=headers).status_code == 400


def test_a_text_of_megabytes_lets_others_in_while_it_is_split(address: str) -> None:
    """The library holds all threads while it encodes one text, and none while it encodes a list."""
    gaps, over = [0.0], threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not over.wait(0.005):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    ticking = threading.Thread(target=tick)
    ticking.start()
    begun = time.monotonic()
    got = httpx.post(f"{address}/tokenize", json={"prompt": "ab " * 400_000}, timeout=120)
    over.set()
    ticking.join()
    assert got.status_code == 200
    assert max(gaps) < (time.monotonic() - begun) / 2


NESTED: dict[str, Any] = {}
for _ in range(200):
    NESTED = {"properties": {"a": NESTED}}
TOOL = {"type": "function", "name": "a"}
FREE: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/responses", {"input": "a", "tools": [{**TOOL, "x": float("nan")}]}, "JSON has no form"),
    ("/v1/responses", {"input": "a", "tools": [{**TOOL, "x": [float("inf")]}]}, "JSON has no form"),
    ("/v1/responses", {"input": "a", "tools": [{**TOOL, "parameters": NESTED}]}, "100 deep"),
    ("/v1/responses", {"input": "a", "background": 0}, "no boolean"),
    ("/v1/completions", {"prompt": "a", "guided_json": {"const": float("nan")}}, "JSON has no"),
    ("/v1/completions", {"prompt": ["a"] * 1024, "n": 128}, "131072 outputs"),
    ("/v1/completions", {"prompt": "a", "guided_choice": ["x" * 200] * 1000}, "characters"),
    (
        "/v1/responses",
        {
            "input": "a",
            "tool_choice": "required",
            "tools": [
                {**TOOL, "name": f"a{i}", "parameters": {"enum": ["x" * 99]}} for i in range(2000)
            ],
        },
        "characters, this server reads",
    ),
]


@pytest.mark.parametrize(("path", "body", "said"), FREE)
def test_what_a_server_could_choke_on_is_a_400(
    address: str, path: str, body: dict[str, Any], said: str
) -> None:
    headers = {"content-type": "application/json"}
    got = httpx.post(f"{address}{path}", content=json.dumps(body), headers=headers, timeout=20)
    assert got.status_code == 400, got.text
    assert said in got.json()["error"]["message"]


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text('a\\",[{', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(',"\\[', max_size=3), inner)
    ),
    max_leaves=20,
)


def counted(value: Any) -> int:
    """Brackets and commas of a value's JSON."""
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(0, len(value) - 1) + sum(map(counted, inner))


@settings(deadline=None)
@given(VALUES, st.data())
def test_values_are_counted_however_the_text_comes(value: Any, data: st.DataObject) -> None:
    text, values = json.dumps(value).encode(), Values()
    while text:
        size = data.draw(st.integers(1, len(text)))
        values.push(text[:size])
        text = text[size:]
    assert values.count == counted(value)


@contextmanager
def endless() -> Iterator[tuple[str, list[str]]]:
    """A server that writes for ever, with limits of a moment."""
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/once":
            await send({"type": "http.response.body", "body": b"a" * 2**24, "more_body": False})
        else:
            for _ in range(2**14):
                await send({"type": "http.response.body", "body": b"a" * 2**10, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.append(scope["path"])

    http = limited(head_seconds=5, answer_seconds=SECONDS)
    config = uvicorn.Config(app, http=http, loop="asyncio", log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with listening("127.0.0.1", 0) as listener:
        serving = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
        )
        serving.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", ended
            until = time.monotonic() + 10
            while server.server_state.connections and time.monotonic() < until:
                time.sleep(0.01)
            assert not server.server_state.connections
        finally:
            server.should_exit = True
            serving.join(20)


@pytest.mark.parametrize("path", ["/once", "/stream"])
def test_a_client_that_never_reads_its_answer_is_dropped_in_the_end(path: str) -> None:
    with endless() as (address, ended), connected(address) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.sendall(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
        until = time.monotonic() + 10
        while path not in ended and time.monotonic() < until:
            time.sleep(0.01)
        assert path in ended


def test_the_openapi_page_tells_of_the_limits(address: str) -> None:
    page = httpx.get(f"{address}/openapi.json").json()
    for path, methods in page["paths"].items():
        if "post" in methods:
            assert {"408", "413"} <= set(methods["post"]["responses"]), path
