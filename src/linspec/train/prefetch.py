"""The next batch is made while a step runs: on a thread, and on its way to the GPU from pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch


class Prefetch:
    """`batch_fn(step)` on a device, for steps below `steps` that are asked for one after the other.

    What it raises is raised when its step is asked for. Leaving it ends the thread.
    """

    def __init__(
        self, batch_fn: Callable[[int], torch.Tensor], device: torch.device, steps: int
    ) -> None:
        self._batch_fn, self._device, self._steps = batch_fn, device, steps
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[torch.Tensor]] | None = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> torch.Tensor:
        known, self._next = self._next, None
        future = known[1] if known and known[0] == step else self._begun(step)
        batch = future.result().to(self._device, non_blocking=True)
        if step + 1 < self._steps:
            self._next = step + 1, self._begun(step + 1)
        return batch

    def _begun(self, step: int) -> Future[torch.Tensor]:
        return self._thread.submit(self._made, step)

    def _made(self, step: int) -> torch.Tensor:
        batch = self._batch_fn(step)
        # a copy from other memory would wait for the GPU
        return batch.pin_memory() if self._device.type == "cuda" else batch
