"""Programs of static shape as CUDA graphs: launched once a step instead of once an operation.

A *program* takes nothing and returns tensors. It reads and writes tensors that stay where they are, decides
nothing by what is in them, and gives the same when it is run again. A recorded one computes with whatever is
in those tensors when it is replayed, and its results are the same tensors every time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from linspec.errors import ConfigError
from linspec.kernels.gpu.switches import switch

Program = Callable[[], Any]
# graphs that are kept: each holds the buffers between its operations
KEPT = 32
SWITCH = "LINSPEC_CUDA_GRAPHS"
SWITCHES = ("auto", "on", "off")
# runs ahead of a capture, in which libraries choose their kernels and take their memory
_WARM_UP = 2


class Recorder(Protocol):
    """Makes a program something that is launched at once."""

    def record(self, program: Program, pool: Any) -> tuple[Callable[[], None], Any, Any]:
        """How to run `program` again, and the results that this writes to; it may run several times here.

        pool: memory that recorded programs share, as the last one returned it; None for the first.
        """
        ...


class CudaGraphs:
    """CUDA's own graphs, on the current device."""

    def record(self, program: Program, pool: Any) -> tuple[Callable[[], None], Any, Any]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                program()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            results = program()
        return graph.replay, results, graph.pool()


def recorder_for(device: torch.device) -> Recorder | None:
    """What records programs on a device, None for nothing: CUDA graphs, unless LINSPEC_CUDA_GRAPHS is 'off'.

    Raises ConfigError for another word than auto, on or off, and for 'on' where there is no CUDA.
    """
    chosen = switch(SWITCH, SWITCHES)
    if device.type == "cuda":
        return None if chosen == "off" else CudaGraphs()
    if chosen == "on":
        raise ConfigError(
            f"{SWITCH} is 'on', but the model is on device {device.type!r}, which has no CUDA graphs; use "
            "'auto', or --device cuda"
        )
    return None


class Recorded:
    """Recorded programs by key, the least recently used of them dropped first.

    recorder: None runs the programs themselves, operation by operation.
    """

    def __init__(self, recorder: Recorder | None, kept: int = KEPT) -> None:
        self.recorder, self.kept = recorder, kept
        self._made: OrderedDict[Hashable, tuple[Callable[[], None], Any]] = OrderedDict()
        # it lives as long as one of the graphs here: a pool whose graphs are all gone takes no new one
        self._pool: Any = None

    def run(self, key: Hashable, program: Program) -> Any:
        """The results of `program`, recorded at its first run under `key`; they hold until the next run."""
        if self.recorder is None:
            return program()
        made = self._made.get(key)
        if made is None:
            replay, results, self._pool = self.recorder.record(program, self._pool)
            made = self._made[key] = replay, results
            if len(self._made) > self.kept:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        replay, results = made
        replay()
        return results

    def __len__(self) -> int:
        return len(self._made)
