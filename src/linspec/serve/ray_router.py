"""The rule of routing.ranked as Ray Serve asks for it."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from linspec.serve.fleet import Asked
from linspec.serve.routing import ranked


class PrefixRouter(RequestRouter):
    """Sends requests that begin alike to one replica; roomy: requests that it takes whatever others have."""

    def initialize_state(self, roomy: int = 1, **more: Any) -> None:
        """Called once by Ray, with the arguments of the deployment."""
        self._roomy = roomy

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each: Ray takes the first that has room."""
        asked = pending_request.args[0] if pending_request and pending_request.args else None
        if pending_request is not None:
            # all are named at once: where none has room, Ray waits before it asks again
            pending_request.routing_context.should_backoff = True
        key = asked.key if isinstance(asked, Asked) else ""
        known = {each.replica_id.unique_id: each for each in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(each.replica_id) or 0 for name, each in known.items()}
        return [[known[name]] for name in ranked(key, loads, self._roomy)]
