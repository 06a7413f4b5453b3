"""Requests that schemathesis makes of the OpenAPI page, right and wrong: each answer is one that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import quiet, running, talker
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from test_embeddings import encoder_dir

from linspec.llm import LLM
from linspec.serve.app import make_app
from linspec.serve.embedder import Embedder
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker

schemathesis = pytest.importorskip(
    "schemathesis", reason="no schemathesis here: pip install 'linspec[dev]'"
)
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

pytestmark = pytest.mark.slow
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance),
    *(response_headers_conformance, response_schema_conformance),
    *(unsupported_method, allow_header_conformance),
]
# a stream that ends with the server
ENDLESS = "/linspec/live"
MODES = {"right": GenerationMode.POSITIVE, "wrong": GenerationMode.NEGATIVE}
PAGE = make_app({}, Settings.model_construct()).openapi()["paths"]
CASES = [
    (path, method, mode)
    for path, methods in PAGE.items()
    for method, told in methods.items()
    for mode in MODES
    # a request without a body has nothing that could be wrong
    if path != ENDLESS and (mode == "right" or "requestBody" in told)
]


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[str, Worker]]:
    limits = Settings.read(None, max_tokens=20, max_prompt_tokens=200, queue_limit=300)
    llms, embedders = {"talker": LLM(talker(), max_batch=4)}, {"vectors": Embedder(encoder_dir())}
    with running(llms, limits, embedders=embedders) as (address, workers):
        yield address, workers["talker"]


@pytest.fixture(scope="module")
def page(started: tuple[str, Worker]) -> Any:
    return schemathesis.openapi.from_url(f"{started[0]}/openapi.json")


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_every_answer_is_one_that_the_page_has(
    page: Any, started: tuple[str, Worker], path: str, method: str, mode: str
) -> None:
    checks = CHECKS + [negative_data_rejection] * (mode == "wrong")

    @examples(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(page[path][method].as_strategy(generation_mode=MODES[mode]))
    def ask(case: Any) -> None:
        case.call_and_validate(checks=checks, timeout=60)

    ask()
    assert quiet(started[1])
    assert httpx.get(f"{started[0]}/health").status_code == 200
