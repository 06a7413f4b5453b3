"""Spans of requests: their phases, their parents, and a collector that gets them."""

from __future__ import annotations

import gzip
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from api_server import quiet, running, talker

from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.serve.app import make_app
from linspec.serve.settings import Settings
from linspec.serve.tracing import Tracing, tracing_of

REASON = "no opentelemetry here: pip install 'linspec[serve,otel]'"
pytest.importorskip("opentelemetry.sdk.trace", reason=REASON)
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=REASON)

from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)

SHORT = {"prompt": "ab", "max_tokens": 8, "ignore_eos": True}
Seen = tuple[str, InMemorySpanExporter]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def started() -> Iterator[Seen]:
    spans, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with running({"talker": LLM(talker(), max_batch=2)}) as (address, workers):
        worker = workers["talker"]
        worker.observe(Tracing(provider).watch("talker", worker.clock))
        yield address, spans
    provider.shutdown()


@pytest.fixture
def seen(started: Seen) -> Seen:
    started[1].clear()
    return started


def spans_of(spans: InMemorySpanExporter, count: int) -> dict[str, list[Any]]:
    """The spans of `count` requests by name, when all are there."""
    until = time.monotonic() + 20
    while True:
        found = spans.get_finished_spans()
        roots = [span for span in found if span.name == "generate talker"]
        if len(roots) == count or time.monotonic() > until:
            names = {span.name for span in found}
            return {name: [span for span in found if span.name == name] for name in names}
        time.sleep(0.005)


def test_queue_prefill_and_decode_fill_the_time_of_a_request(seen: Seen) -> None:
    before = time.time()
    got = httpx.post(f"{seen[0]}/v1/completions", json=SHORT, headers={"x-request-id": "mine"})
    usage = got.json()["usage"]
    found = spans_of(seen[1], 1)
    (root,) = found["generate talker"]
    parts = [found[name][0] for name in ("queue", "prefill", "decode")]
    assert all(part.parent.span_id == root.context.span_id for part in parts)
    edges = [root.start_time, *(part.end_time for part in parts)]
    assert [part.start_time for part in parts] == edges[:-1] and edges[-1] == root.end_time
    assert edges == sorted(edges)
    assert before - 1 < root.start_time / 1e9 < root.end_time / 1e9 < time.time() + 1
    facts = root.attributes
    assert facts["linspec.request_id"] == "mine" and not facts["linspec.cancelled"]
    assert facts["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert facts["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 8
    assert facts["gen_ai.response.finish_reasons"] == ("length",)
    assert root.status.is_ok or root.status.status_code.name == "UNSET"


def test_the_span_of_the_caller_is_the_parent(seen: Seen) -> None:
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{span}-01"}
    httpx.post(f"{seen[0]}/v1/completions", json=SHORT, headers=headers)
    for each in (each for spans in spans_of(seen[1], 1).values() for each in spans):
        assert f"{each.context.trace_id:032x}" == trace
    assert f"{spans_of(seen[1], 1)['generate talker'][0].parent.span_id:016x}" == span


@pytest.mark.parametrize("header", ["", "x", "00-0-0-00", "é" * 50])
def test_a_header_that_names_no_span_harms_nothing(seen: Seen, header: str) -> None:
    headers = [(b"traceparent", header.encode())]
    got = httpx.post(f"{seen[0]}/v1/completions", json=SHORT, headers=headers)
    assert got.status_code == 200
    assert spans_of(seen[1], 1)["generate talker"][0].parent is None


def test_every_request_of_many_has_its_spans(seen: Seen) -> None:
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(
            lambda at: httpx.post(
                f"{seen[0]}/v1/completions", json=SHORT | {"seed": at}, timeout=60
            ),
            range(16),
        ):
            assert got.status_code == 200
    found = spans_of(seen[1], 16)
    assert {name: len(spans) for name, spans in found.items()} == dict.fromkeys(
        ("generate talker", "queue", "prefill", "decode"), 16
    )


def test_a_failure_and_a_client_that_leaves_are_marked(seen: Seen) -> None:
    bans = {"prompt": "ab", "bad_words": ["a"], "guided_regex": "a+"}
    assert httpx.post(f"{seen[0]}/v1/completions", json=bans).status_code == 400
    (broken,) = spans_of(seen[1], 1)["generate talker"]
    assert broken.status.status_code.name == "ERROR" and broken.attributes["error.type"]
    seen[1].clear()
    body = {**SHORT, "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{seen[0]}/v1/completions", json=body) as got:
        next(got.iter_lines())
    (left,) = spans_of(seen[1], 1)["generate talker"]
    assert left.attributes["linspec.cancelled"]


def test_no_text_is_in_a_span(seen: Seen) -> None:
    asked = {**SHORT, "prompt": "the end", "temperature": 0}
    text = httpx.post(f"{seen[0]}/v1/completions", json=asked).json()["choices"][0]["text"]
    for each in (each for spans in spans_of(seen[1], 1).values() for each in spans):
        assert "the end" not in each.to_json() and text not in each.to_json()


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """What takes spans over HTTP: its address, and the bodies that it got."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            packed = self.headers.get("content-encoding") == "gzip"
            bodies.append(gzip.decompress(body) if packed else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("flag", [True, False])
def test_a_collector_gets_the_spans_before_the_server_has_ended(
    flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with collector() as (endpoint, bodies):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        with running({"talker": LLM(talker())}, Settings.read(None, otel=flag)) as (
            address,
            workers,
        ):
            for _ in range(3):
                httpx.post(f"{address}/v1/completions", json=SHORT)
            assert quiet(workers["talker"])
    found = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    resources = [each for request in found for each in request.resource_spans]
    names = [s.name for r in resources for scope in r.scope_spans for s in scope.spans]
    assert sorted(names) == sorted(["generate talker", "queue", "prefill", "decode"] * 3)
    service = {a.key: a.value.string_value for a in resources[0].resource.attributes}
    assert service["service.name"] == "linspec"


def test_a_collector_that_is_not_there_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    begun = time.monotonic()
    with running({"talker": LLM(talker())}) as (address, _):
        assert httpx.post(f"{address}/v1/completions", json=SHORT).status_code == 200
    assert time.monotonic() - begun < 20


def test_without_being_asked_there_are_none() -> None:
    assert tracing_of(Settings.read(None)) is None


def test_without_its_packages_the_flag_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'linspec\[serve,otel\]'"):
        make_app({}, Settings.read(None, otel=True))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert tracing_of(Settings.read(None)) is None
    assert "linspec[serve,otel]" in caplog.text
