"""Where the time and the memory of a step go: attention, MLP and the rest; the highest memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from linspec.models.decoder import Decoder

_SAMPLE_SECONDS = 0.002


class Stopwatch:
    """Seconds spent in the mixers and in the MLPs of a model while it is watched.

    Mixers include their projections, as in the paper's breakdown.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.attention = self.mlp = 0.0

    @contextlib.contextmanager
    def watch(self, model: Decoder) -> Iterator[None]:
        """Time the parts of `model` while it lasts."""
        watched = [
            *((block.mixer, "step", "attention") for block in model.layers),
            *((block.mlp, "forward", "mlp") for block in model.layers),
        ]
        for part, method, name in watched:
            # an attribute of the instance hides the method of the class
            object.__setattr__(part, method, self._timed(getattr(part, method), name))
        try:
            yield
        finally:
            for part, method, _ in watched:
                object.__delattr__(part, method)

    def _timed(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = self.clock()
            out = method(*args, **kwargs)
            setattr(self, name, getattr(self, name) + self.clock() - began)
            return out

        return run

    def shares(self, total: float) -> dict[str, float]:
        """Shares of `total` seconds: attention, mlp, other."""
        attention, mlp = self.attention / total, self.mlp / total
        return {"attention": attention, "mlp": mlp, "other": 1 - attention - mlp}


class PeakMemory:
    """The highest resident memory of this process while it lasts, above that at its start.

    Sampled, as torch keeps no such figure on a CPU; memory freed before it that the allocator has
    kept hides as much of the growth. None where the system does not tell.
    """

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._start = self._highest = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, _resident())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if self._start:
            self.bytes = max(self._highest, _resident()) - self._start


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096
