"""What an app serves: workers and encoders by name, and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from linspec.serve.embedder import Embedder
from linspec.serve.failures import Failure
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker
from linspec.utils.messages import did_you_mean, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """Models by the name that clients give; created: when, in seconds of the epoch."""

    workers: Mapping[str, Worker]
    settings: Settings
    created: int
    embedders: Mapping[str, Embedder] = field(default_factory=dict)

    def worker(self, name: str | None) -> tuple[str, Worker]:
        """The model of that name, or the only one; raises Failure 404."""
        if name in self.embedders:
            raise Failure(
                400,
                f"{shown(name)} is an encoder and writes nothing; ask /v1/embeddings",
                code="wrong_model",
                param="model",
            )
        return self._found(self.workers, name)

    def embedder(self, name: str | None) -> tuple[str, Embedder]:
        """The encoder of that name, or the only one; raises Failure 400 or 404."""
        if not self.embedders or name in self.workers:
            what = "this server" if name is None else shown(name)
            raise Failure(
                400,
                f"{what} makes no embeddings; serve the directory of a BERT encoder beside it",
                code="wrong_model",
                param="model",
            )
        return self._found(self.embedders, name)

    def _found(self, known: Mapping[str, T], name: str | None) -> tuple[str, T]:
        if name is None and len(known) == 1:
            return next(iter(known.items()))
        if name is None or name not in known:
            given = "no model is named" if name is None else f"there is no model {shown(name)}"
            raise Failure(
                404,
                f"{given}; /v1/models lists {', '.join([*self.workers, *self.embedders])}"
                f"{did_you_mean(name or '', known)}",
                code="model_not_found",
                param="model",
            )
        return name, known[name]


def _served(request: Request) -> Served:
    found: Served = request.app.state.served
    return found


Serving = Annotated[Served, Depends(_served)]
