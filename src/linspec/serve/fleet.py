"""What a front knows of the replicas behind it: they answer, they may die, they can be replaced."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Message


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it goes to a replica.

    Attributes:
        key: what it shares with requests that belong to the same replica; see routing.opening.
        tenant: whose key it had; the doors stand before the replicas.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    key: str
    tenant: str
    request_id: str


class ReplicaLost(Exception):
    """A replica ended before its answer did."""


class Fleet(Protocol):
    """Replicas that answer alike."""

    def answer(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """The messages of an ASGI answer; raises ReplicaLost where the replica died.

        Whoever closes the generator early has left: the replica stops.
        """

    async def metrics(self) -> dict[str, str]:
        """The metrics of each replica, by its name."""

    async def ready(self) -> bool:
        """Whether one of them takes requests."""

    def restart(self) -> None:
        """Replace all, one after another, while the others answer; returns when that is done."""

    def stop(self) -> None:
        """End all."""
