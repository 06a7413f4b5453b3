"""The app: endpoints over workers, behind their doors.

app = make_app({"smollm2": Worker(LLM("smollm2"))}, Settings())
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from sse_starlette.sse import AppStatus
from starlette.concurrency import run_in_threadpool

import linspec
from linspec.serve import failures
from linspec.serve.embedder import Embedder
from linspec.serve.endpoints import about, chat, completions, embeddings, responses, tokens
from linspec.serve.front import put_front
from linspec.serve.keys import Keys
from linspec.serve.seeing import seeing, watched
from linspec.serve.served import Served
from linspec.serve.settings import Settings
from linspec.serve.tracing import Tracing, tracing_of
from linspec.serve.worker import Worker

_ENDPOINTS = (completions, chat, responses, embeddings, about, tokens)


def make_app(
    models: Mapping[str, Worker],
    settings: Settings,
    embedders: Mapping[str, Embedder] | None = None,
) -> FastAPI:
    """An app that serves `models` by name, and stops them when it ends.

    Raises ConfigError for bad keys, and for spans without their packages.
    """
    keys = Keys.of(settings)
    tracing = tracing_of(settings)
    if tracing is not None:
        for name, worker in models.items():
            worker.observe(tracing.watch(name, worker.clock))
    served = Served(models, settings, int(time.time()), embedders or {})
    # streams end when their requests do: the workers see to it that they do in time
    AppStatus.enable_automatic_graceful_drain = False
    app = FastAPI(
        title="linspec",
        version=linspec.__version__,
        description="OpenAI's API, by linspec.",
        lifespan=partial(_lifespan, served, tracing),
    )
    app.state.served = served
    failures.install(app)
    for module in _ENDPOINTS:
        app.include_router(module.router)
    app.include_router(seeing(*watched(models)))
    put_front(app, keys, settings)
    return app


@asynccontextmanager
async def _lifespan(served: Served, tracing: Tracing | None, app: FastAPI) -> AsyncIterator[None]:
    yield
    for worker in served.workers.values():
        await run_in_threadpool(worker.stop, served.settings.shutdown_seconds)
    if tracing is not None:
        await run_in_threadpool(tracing.end)
