"""What a step of 1…64 nodes costs: measured once per machine and model, kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from linspec.decoding.protocols import CausalModel
from linspec.decoding.step import StepInput
from linspec.errors import CheckpointError, LinspecError
from linspec.kernels.cpu.structs import ABI
from linspec.state.sequence_states import SequenceStates
from linspec.utils.border import read_json
from linspec.utils.files import cache_dir, replace_text

MEASURED_NODES = (1, 2, 4, 8, 16, 32, 64)
_LEAST_REPEATS, _REPEATS = 3, 20
# Large models are slow but repeat well: no size is timed for longer than this, if it can be helped.
_SECONDS = 0.3
_CONTEXT = 48


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one step by the number of its nodes; straight lines between measured points."""

    seconds: Mapping[int, float]

    def __call__(self, nodes: float) -> float:
        points = self._points
        if len(points) == 1:
            return points[0][1]
        right = min(max(bisect_left(points, (nodes, 0.0)), 1), len(points) - 1)
        (a, low), (b, high) = points[right - 1], points[right]
        return max(low + (high - low) / (b - a) * (nodes - a), 1e-9)

    @cached_property
    def _points(self) -> list[tuple[int, float]]:
        return sorted(self.seconds.items())


def measure(model: CausalModel, clock: Callable[[], float] = time.perf_counter) -> CostCurve:
    """Time steps of a chain of draft nodes after a short context.

    More nodes never cost less, and noise only adds time: what fewer nodes took longer was noise.
    """
    state = model.new_state()
    context = min(_CONTEXT, (model.config.position_limit or _CONTEXT) // 2)
    fed, _ = model.open([0] * context, 0, state)
    model.step([StepInput(0, fed, all_logits=False)], state)
    state.commit(0, range(len(fed)))
    limit = model.config.position_limit
    found: dict[int, float] = {}
    for nodes in MEASURED_NODES:
        if limit is not None and context + nodes > limit:
            break
        found[nodes] = _quickest_step(model, state, nodes, clock)
    least = math.inf
    for nodes in sorted(found, reverse=True):
        least = found[nodes] = min(least, found[nodes])
    return CostCurve(found)


def _quickest_step(
    model: CausalModel, state: SequenceStates, nodes: int, clock: Callable[[], float]
) -> float:
    """Seconds of the least disturbed repeat: the curve is kept, a busy moment must not be."""
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or (len(times) < _REPEATS and sum(times) < _SECONDS):
        began = clock()
        model.step([StepInput(0, [0] * nodes)], state)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
        state.drop(0)
    # the first one also builds tree_masks and touches the weights
    return min(times[1:])


def load_or_measure(
    model: CausalModel, clock: Callable[[], float] = time.perf_counter
) -> CostCurve:
    """The curve of this model's shape on this machine, from disk when it was measured before."""
    path = _cache_path(model)
    stored = _stored(path)
    if stored is not None:
        return stored
    curve = measure(model, clock)
    # a read-only home only means measuring again next time
    with contextlib.suppress(CheckpointError):
        replace_text(path, json.dumps(dict(curve.seconds)))
    return curve


def _stored(path: Path) -> CostCurve | None:
    """The curve in a file; None where there is none, or what is there are not the seconds of steps."""
    try:
        seconds = {int(n): float(s) for n, s in read_json(path).items()}
    except (LinspecError, ValueError, TypeError):
        return None
    sound = seconds and all(n > 0 and 0 < s < math.inf for n, s in seconds.items())
    return CostCurve(seconds) if sound else None


def _cache_path(model: CausalModel) -> Path:
    facts = (
        json.dumps(model.config.to_dict(), sort_keys=True),
        str(model.dtype),
        str(model.device),
        platform.processor() or platform.machine(),
        torch.__version__,
        str(torch.get_num_threads()),
        str(model.is_inference),
        f"{model.kernels} {ABI}",
    )
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    return cache_dir() / "costs" / f"{key}.json"
