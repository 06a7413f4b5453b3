"""Replicas on Ray Serve, which starts them, looks after their health and replaces them."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from linspec.errors import ConfigError
from linspec.serve.app import make_app
from linspec.serve.asgi_call import called
from linspec.serve.failures import Failure
from linspec.serve.fleet import Asked, ReplicaLost
from linspec.serve.ray_found import enter, hushed
from linspec.serve.ray_router import PrefixRouter
from linspec.serve.run import loaded
from linspec.serve.settings import Settings

_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    TaskUnschedulableError,
    ReplicaUnavailableError,
)
# of the front alone: replicas cannot be reached but through it
_FRONT_ONLY = {"api_key", "key_file", "tls_cert", "tls_key", "cors_origins", "host", "port"}
_HEALTH_SECONDS = 5.0
# what is wrong with a model is so again
_TRIES = 2


class Replica:
    """The models and the app of one server, which Ray reaches without a socket."""

    def __init__(
        self,
        named: Mapping[str, str],
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        folder: str,
        generation: int,
    ) -> None:
        # for Ray, what has another generation is another replica
        del generation
        enter(folder)
        self.told: list[str] = []
        made = Settings.model_construct(**settings)
        self._workers, embedders = loaded(named, made, options, self.told.append)
        self._app = make_app(self._workers, made, embedders)

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that fails here."""
        if any(worker.broken for worker in self._workers.values()):
            raise RuntimeError("a model has stopped")

    async def about(self) -> list[str]:
        """Lines for people, of what was loaded."""
        return self.told

    async def answer(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """The messages of the answer."""
        async for message in called(self._app, asked):
            yield message

    async def metrics(self) -> tuple[str, str]:
        """Its name and its metrics."""
        asked = Asked("GET", "/metrics", b"", (), b"", "", "", "")
        parts = [message.get("body", b"") async for message in called(self._app, asked)]
        return serve.get_replica_context().replica_id.unique_id, b"".join(parts).decode()


class RayFleet:
    """`replicas` of the settings, as an application of Ray Serve; Ray runs already.

    Raises ConfigError where they do not start.
    """

    def __init__(
        self,
        named: Mapping[str, str],
        settings: Settings,
        options: Mapping[str, Any],
        cpus: float,
    ) -> None:
        self.name = f"linspec-{uuid.uuid4().hex[:8]}"
        self._settings, self._generation = settings, 0
        self._given = (dict(named), settings.model_dump(exclude=_FRONT_ONLY), dict(options))
        self._deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=settings.replicas,
            ray_actor_options={"num_cpus": cpus},
            max_ongoing_requests=settings.max_batch + settings.queue_limit,
            max_queued_requests=max(settings.queue_limit, 1),
            graceful_shutdown_timeout_s=settings.shutdown_seconds,
            graceful_shutdown_wait_loop_s=0.1,
            max_constructor_retry_count=_TRIES,
            health_check_period_s=_HEALTH_SECONDS,
            request_router_config=RequestRouterConfig(
                request_router_class=PrefixRouter,
                request_router_kwargs={"roomy": max(settings.max_batch // 2, 1)},
            ),
        )
        hushed("ray.serve")
        serve.start(proxy_location="Disabled")
        try:
            self._handle = self._deploy()
        except BaseException:
            self.stop()
            raise
        self._answers = self._handle.options(method_name="answer", stream=True)

    def _deploy(self) -> Any:
        bound = self._deployment.bind(*self._given, os.getcwd(), self._generation)
        try:
            return serve.run(bound, name=self.name, route_prefix=None)
        except RuntimeError as error:
            raise ConfigError(f"the replicas do not start: {self._reason() or error}") from error

    def _reason(self) -> str:
        """What a replica raised that did not start: the last line of a traceback."""
        lines = self._status().deployments["replica"].message.strip().splitlines()
        return re.sub(r"^linspec\.errors\.\w+: ", "", lines[-1].strip()) if lines else ""

    def _status(self) -> Any:
        return serve.status().applications[self.name]

    def told(self) -> list[str]:
        """What a replica says about what it loaded."""
        return list(self._handle.about.remote().result())

    async def answer(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """See Fleet."""
        messages = self._answers.remote(asked)
        whole = False
        try:
            async for message in messages:
                yield message
            whole = True
        except _LOST as error:
            whole = True
            raise ReplicaLost(str(error).partition("\n")[0]) from error
        except BackPressureError as error:
            raise Failure(
                429,
                "all replicas are full; ask again later, or raise --replicas or --queue-limit",
                code="queue_full",
                headers={"retry-after": "1"},
            ) from error
        except DeploymentUnavailableError as error:
            raise Failure(503, "no replica can be started", code="unavailable") from error
        finally:
            if not whole:
                messages.cancel()

    async def metrics(self) -> dict[str, str]:
        """See Fleet."""
        return dict(await self._handle.broadcast("metrics").results_async())

    async def ready(self) -> bool:
        """See Fleet."""
        return await run_in_threadpool(self._ready)

    def _ready(self) -> bool:
        states = self._status().deployments["replica"].replica_states
        return any(str(state) == "RUNNING" and count for state, count in states.items())

    def restart(self) -> None:
        """See Fleet."""
        self._generation += 1
        self._deploy()

    def stop(self) -> None:
        """See Fleet."""
        serve.delete(self.name)
