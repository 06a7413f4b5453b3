"""/v1/models, /health, /ready and /version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

import linspec
from linspec.llm import LLM
from linspec.serve.failures import RESPONSES, Failure
from linspec.serve.schemas.base import ErrorAnswer
from linspec.serve.schemas.others import Health, ModelCard, ModelList, Version
from linspec.serve.served import Served, Serving
from linspec.utils.messages import shown

router = APIRouter()
_UNFIT: dict[int | str, dict[str, Any]] = {503: {"model": ErrorAnswer}}
_LISTED: dict[int | str, dict[str, Any]] = {
    status: RESPONSES[status] for status in (401, 404, "default")
}


@router.get("/v1/models", responses=_LISTED)
async def models(served: Serving) -> ModelList:
    """All models."""
    return ModelList(data=_cards(served))


@router.get("/v1/models/{name:path}", responses=_LISTED)
async def model(name: str, served: Serving) -> ModelCard:
    """One model."""
    for card in _cards(served):
        if card.id == name:
            return card
    message = f"there is no model {shown(name)}; /v1/models lists those that there are"
    raise Failure(404, message, code="model_not_found", param="model")


def longest(llm: LLM) -> int | None:
    """Most tokens of a prompt and its output, None without a limit."""
    own = llm.engine.limits.longest
    return llm.model.config.position_limit if own is None else own


def _cards(served: Served) -> list[ModelCard]:
    texts = [
        ModelCard(id=name, created=served.created, max_model_len=longest(worker.llm), kind="text")
        for name, worker in served.workers.items()
    ]
    vectors = [
        ModelCard(id=name, created=served.created, max_model_len=each.longest, kind="embeddings")
        for name, each in served.embedders.items()
    ]
    return texts + vectors


def _stopped() -> Failure:
    return Failure(503, "a model has stopped; restart the server", code="stopped")


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=_UNFIT)
async def health(served: Serving) -> Health:
    """Whether all models work: for who restarts the server."""
    if any(worker.broken for worker in served.workers.values()):
        raise _stopped()
    return Health(status="ok")


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=_UNFIT)
async def ready(served: Serving) -> Health:
    """Whether requests are taken: for who sends them here."""
    if any(worker.broken for worker in served.workers.values()):
        raise _stopped()
    if not all(worker.ready for worker in served.workers.values()):
        raise Failure(503, "the server is shutting down", code="shutting_down")
    return Health(status="ok")


@router.get("/version", responses={401: RESPONSES[401]})
async def version() -> Version:
    """Which linspec it is."""
    return Version(version=linspec.__version__)
