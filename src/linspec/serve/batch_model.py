"""Batches on one machine: the server of this process answers, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

from linspec.llm import LLM
from linspec.serve.app import make_app
from linspec.serve.batch import Batch, app_asker
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker

# nobody waits in front of a batch, and its lines wait for each other
_SECONDS = 1e9
_BYTES = 2**31 - 1


def batch_settings(max_batch: int) -> Settings:
    """Those of the server that answers; the settings of a server that listens are none of a batch."""
    return Settings.model_construct(
        max_batch=max_batch, request_seconds=_SECONDS, max_body_bytes=_BYTES, max_tokens=_BYTES
    )


def batch_worker(model: str, settings: Settings, at_once: int, **options: Any) -> Worker:
    """A worker for `at_once` lines, of `model` as it is loaded with `options`; see `LLM`."""
    llm = LLM(model, max_batch=settings.max_batch, **options)
    return Worker(llm, queue_limit=settings.queue_limit + at_once)


def answer_with(batch: Batch, model: str, *, max_batch: int = 8, **options: Any) -> None:
    """Answer the open lines of `batch` with `model`, which is loaded with `options`; see `LLM`.

    Raises what `LLM` and `Batch.run` raise; what is answered until then is on disk.
    """
    settings = batch_settings(max_batch)
    # the next lines are read while those before them are answered
    at_once = 2 * max_batch
    with batch_worker(model, settings, at_once, **options) as worker:
        asyncio.run(_answer(batch, worker, settings, at_once))


async def _answer(batch: Batch, worker: Worker, settings: Settings, at_once: int) -> None:
    app = make_app({batch.model: worker}, settings)
    async with app_asker(app) as ask:
        await batch.run(ask, at_once=at_once, show_progress=True)
