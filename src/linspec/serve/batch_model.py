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


def answer_with(batch: Batch, model: str, *, max_batch: int = 8, **options: Any) -> None:
    """Answer the open lines of `batch` with `model`, which is loaded with `options`; see `LLM`.

    Raises what `LLM` and `Batch.run` raise; what is answered until then is on disk.
    """
    # the settings of a server are none of a batch: the environment may have some
    settings = Settings.model_construct(
        max_batch=max_batch, request_seconds=_SECONDS, max_body_bytes=_BYTES, max_tokens=_BYTES
    )
    # the next lines are read while those before them are answered
    at_once = 2 * max_batch
    llm = LLM(model, max_batch=max_batch, **options)
    with Worker(llm, queue_limit=settings.queue_limit + at_once) as worker:
        asyncio.run(_answer(batch, worker, settings, at_once))


async def _answer(batch: Batch, worker: Worker, settings: Settings, at_once: int) -> None:
    app = make_app({batch.model: worker}, settings)
    async with app_asker(app) as ask:
        await batch.run(ask, at_once=at_once, show_progress=True)
