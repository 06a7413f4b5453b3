"""A tensor of a device on its way to the host, which nobody waits for until it is read."""

from __future__ import annotations

from typing import Any

import torch


class HostCopy:
    """What a tensor holds now. Who reads it waits for what was launched before, and for nothing after it."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            # only into pinned memory a copy is not waited for
            self._kept = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._kept.copy_(numbers, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._kept = numbers.to("cpu", copy=True)

    def read(self) -> list[Any]:
        """As lists of numbers."""
        if self._done is not None:
            self._done.synchronize()
        return self._kept.tolist()
