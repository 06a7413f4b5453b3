"""Batches on one machine: the server of this process answers, without a socket."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from linspec.checkpoints.fingerprint import full_fingerprint
from linspec.engine.loops.choice import choose_loop
from linspec.engine.prefix_store import model_key
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.models.linear import integer_bits
from linspec.serve.app import make_app
from linspec.serve.batch import Batch, app_asker
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker
from linspec.verifiers import make_verifier

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


def maker_of(llm: LLM, max_tokens: int, options: Mapping[str, Any]) -> str:
    """A short hash of what decides the answers to a line: the model as it is loaded, and how it decodes.

    The same on every machine with the same `options`, those of `LLM` that `llm` was made with. Drafts count
    only where the verifier lets them change the output. max_tokens: as in `Batch`.
    """
    model, verifier = llm.model, make_verifier(options.get("verifier", "lossless"))
    policy = options.get("policy", "auto")
    about = [
        _weights_of(llm),
        model.config.to_dict(),
        str(model.dtype),
        llm.kv_cache_dtype,
        choose_loop(options.get("loop", "auto"), policy, model),
        max_tokens,
    ]
    if not verifier.lossless:
        about += [options["verifier"], options.get("drafter", "none"), policy]
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights_of(llm: LLM) -> Any:
    """What the weights are known by, and in how many bits they are."""
    model = llm.model
    if not isinstance(model, Decoder):
        return model_key(model, llm.engine.state, llm.kv_cache_dtype)
    # a quantized model is known by the weights that it had
    return full_fingerprint(model), sorted({integer_bits(each) or 0 for each in model.modules()})


def answer_with(batch: Batch, model: str, *, max_batch: int = 8, **options: Any) -> None:
    """Answer the open lines of `batch` with `model`, which is loaded with `options`; see `LLM`.

    Raises what `LLM` and `Batch.run` raise, and InputError where another model made the answers that are
    there, or other settings; what is answered until then is on disk.
    """
    settings = batch_settings(max_batch)
    # the next lines are read while those before them are answered
    at_once = 2 * max_batch
    with batch_worker(model, settings, at_once, **options) as worker:
        batch.begin(maker_of(worker.llm, batch.max_tokens, options))
        asyncio.run(_answer(batch, worker, settings, at_once))


async def _answer(batch: Batch, worker: Worker, settings: Settings, at_once: int) -> None:
    app = make_app({batch.model: worker}, settings)
    async with app_asker(app) as ask:
        await batch.run(ask, at_once=at_once, show_progress=True)
