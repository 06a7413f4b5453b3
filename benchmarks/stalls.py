"""How long streams wait for their next token while another request's long prompt is read.

    python -m benchmarks.stalls smollm2 --prompt-tokens 4000 --tbt-ms 0,50

Some streams decode; then a long prompt arrives. The intervals between pieces of the streams that overlap its
reading are held against their undisturbed median, and the newcomer's time to its first token against that on
an idle machine. 0 is no target: slices of `prefill_tokens`. A line for the whole prompt at once comes first.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from linspec.decoding.sampling import SamplingParams
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.serve.worker import Worker

_STREAMS, _BEGUN, _QUIET = 4, 3.0, 2.0
_LONG = 10**6
_GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


async def _stream(
    worker: Worker, prompt: Sequence[int], tokens: int, stop: asyncio.Event
) -> list[float]:
    """The moments of the pieces of one request, until it ends or is to stop."""
    request = worker.llm.request(list(prompt), SamplingParams(max_tokens=tokens, **_GREEDY))
    job, moments = worker.submit([request]), []
    async for _ in job:
        moments.append(time.perf_counter())
        if stop.is_set():
            job.cancel()
            break
    return moments


async def _stalls(worker: Worker, text: Sequence[int], length: int) -> dict[str, float]:
    """Ratios of one run: texts that nobody has read yet, first alone, then beside streams."""
    never, stop = asyncio.Event(), asyncio.Event()
    pieces = [text[at : at + length] for at in range(0, 3 * length, length)]
    await _stream(worker, pieces[0], 2, never)
    began = time.perf_counter()
    idle = (await _stream(worker, pieces[1], 2, never))[0] - began
    short = [text[-100 * (i + 1) :][:100] for i in range(_STREAMS)]
    streams = [asyncio.create_task(_stream(worker, each, _LONG, stop)) for each in short]
    await asyncio.sleep(_BEGUN)
    began = time.perf_counter()
    ended = (await _stream(worker, pieces[2], 2, never))[0]
    stop.set()
    gaps = [pair for each in streams for pair in itertools.pairwise(await each)]
    usual = statistics.median(b - a for a, b in gaps if began - _QUIET < a and b < began)
    held = [b - a for a, b in gaps if b > began and a < ended]
    return {
        "undisturbed_ms": 1000 * usual,
        "largest": max(held) / usual,
        "p99": float(np.percentile(held, 99)) / usual,
        "idle_first_token_s": idle,
        "first_token": (ended - began) / idle,
    }


def stalls(model: str, length: int, tbt_ms: float | None, prefill_tokens: int) -> dict[str, Any]:
    """The ratios of a model that reads prompts in this way."""
    llm = LLM(model, max_batch=_STREAMS + 1, tbt_ms=tbt_ms, prefill_tokens=prefill_tokens)
    text = llm.encode(" ".join(held_out_documents(["stdlib"])[:200])[: 40 * length])
    with Worker(llm) as worker:
        found = asyncio.run(_stalls(worker, text, length))
    return {"tbt_ms": tbt_ms, "prefill_tokens": prefill_tokens, **found}


def main() -> None:
    """Print a line of JSON for each way to read."""
    about = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    about.add_argument("model")
    about.add_argument("--prompt-tokens", type=int, default=4000)
    about.add_argument("--tbt-ms", default="0,100,50,12", help="targets, by commas")
    about.add_argument("--prefill-tokens", type=int, default=512)
    given = about.parse_args()
    ways: list[tuple[float | None, int]] = [(None, given.prompt_tokens)]
    ways += [(float(each) or None, given.prefill_tokens) for each in given.tbt_ms.split(",")]
    for target, prefill in ways:
        print(json.dumps(stalls(given.model, given.prompt_tokens, target, prefill)), flush=True)


if __name__ == "__main__":
    main()
