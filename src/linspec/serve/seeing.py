"""What is there to look at: the page at /, Prometheus' metrics, live figures."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, Response
from sse_starlette.sse import EventSourceResponse

from linspec.serve.loads import Loads
from linspec.serve.metrics import CONTENT_TYPE, Metrics
from linspec.serve.worker import Worker

PAGE = Path(__file__).with_name("page")
# the page loads nothing from elsewhere, and nobody frames it
_RULES = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # asked for again at every visit, answered with 304 where nothing has changed
    "Cache-Control": "no-cache",
}


def watched(workers: Mapping[str, Worker]) -> tuple[Metrics, Loads]:
    """Metrics and live figures of `workers` by the names of their models, from now on."""
    metrics, loads = Metrics(), Loads()
    for model, worker in workers.items():
        worker.observe(metrics.watch(model, worker))
        worker.observe(loads.watch(model, worker))
    return metrics, loads


def seeing(metrics: Metrics, loads: Loads) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=_RULES)

    @router.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> Response:
        if name not in {each.name for each in PAGE.iterdir()}:
            raise HTTPException(404, f"the page has no part {name[:100]!r}")
        return FileResponse(PAGE / name, headers=_RULES)

    @router.get("/metrics", response_class=Response)
    def prometheus() -> Response:
        """Metrics as Prometheus reads them."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/linspec/loads")
    def figures() -> dict[str, Any]:
        """Load, queue, memory, tokens and drafts of the last two minutes, second by second."""
        return loads.snapshot()

    @router.get("/linspec/live", response_class=EventSourceResponse)
    async def live() -> EventSourceResponse:
        """The same as a stream: one event a second with what is new."""
        return EventSourceResponse(_events(loads))

    return router


async def _events(loads: Loads) -> AsyncIterator[dict[str, str]]:
    async for figures in loads.follow():
        yield {"data": json.dumps(figures)}
