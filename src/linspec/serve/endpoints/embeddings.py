"""/v1/embeddings."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from linspec.serve.failures import RESPONSES, Failure, json_response
from linspec.serve.schemas.completions import as_prompts
from linspec.serve.schemas.others import EmbeddingRequest, Embeddings
from linspec.serve.served import Serving

router = APIRouter(responses=RESPONSES)


@router.post("/v1/embeddings", responses={200: {"model": Embeddings}})
async def embeddings(asked: EmbeddingRequest, served: Serving) -> Any:
    """Vectors of texts, from an encoder."""
    name, embedder = served.embedder(asked.model)
    if asked.dimensions not in (None, embedder.width):
        raise Failure(
            400,
            f"{name} makes vectors of {embedder.width} numbers, got dimensions {asked.dimensions}; leave it "
            "out",
            param="dimensions",
        )
    ids = await run_in_threadpool(embedder.tokens, as_prompts(asked.input))
    vectors = await run_in_threadpool(embedder.embed, ids)
    if asked.encoding_format == "base64":
        found: list[Any] = [
            base64.b64encode(each.numpy().astype("<f4").tobytes()).decode() for each in vectors
        ]
    else:
        found = vectors.tolist()
    count = sum(map(len, ids))
    data = [
        {"object": "embedding", "index": index, "embedding": each}
        for index, each in enumerate(found)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_response({"object": "list", "data": data, "model": name, "usage": usage})
