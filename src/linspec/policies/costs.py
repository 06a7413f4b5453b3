"""What a step of 1…64 nodes costs: a few sizes measured once per machine and model, kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from linspec.decoding.protocols import CausalModel
from linspec.decoding.step import StepInput
from linspec.errors import CheckpointError, LinspecError
from linspec.kernels.cpu.structs import ABI
from linspec.models.memory import weight_bytes
from linspec.policies.roofline import completed
from linspec.state.sequence_states import SequenceStates
from linspec.utils.border import read_json
from linspec.utils.files import cache_dir, replace_text

# the others follow from these; see roofline.py
MEASURED_NODES = (1, 6, 16, 48)
# turns of all sizes: never fewer, and no more than that once they have taken so long
_LEAST_TURNS, _TURNS, _SECONDS = 3, 8, 0.5
_CONTEXT = 48
# tokens of a long cache; how much slower than weights caches are read at most
_LONG, _SLOWER = 4096, 3
_MEASURED_AT_MOST = 3


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one step by the number of its nodes; straight lines between measured points.

    reading: seconds that a token of a long cache adds to a step, at most.
    """

    seconds: Mapping[int, float]
    reading: float = 0.0

    def __call__(self, nodes: float) -> float:
        # asked in every round
        if nodes in self._known:
            return self._known[nodes]
        found = self._between(nodes)
        if isinstance(nodes, int):
            self._known[nodes] = found
        return found

    def _between(self, nodes: float) -> float:
        points = self._points
        if len(points) == 1:
            return points[0][1]
        right = min(max(bisect_left(points, (nodes, 0.0)), 1), len(points) - 1)
        (a, low), (b, high) = points[right - 1], points[right]
        return max(low + (high - low) / (b - a) * (nodes - a), 1e-9)

    @cached_property
    def _known(self) -> dict[float, float]:
        """What was asked of whole numbers of nodes."""
        return {}

    @cached_property
    def _points(self) -> list[tuple[int, float]]:
        return sorted(self.seconds.items())


def measure(model: CausalModel, clock: Callable[[], float] = time.perf_counter) -> CostCurve:
    """Time a few sizes of steps; the others follow from them."""
    return CostCurve(completed(time_steps(model, MEASURED_NODES, clock)))


def time_steps(
    model: CausalModel, nodes: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Seconds of a step of so many draft nodes after a short context, where the model has room for them.

    The sizes take turns, and the quickest turn of each counts: a busy moment lengthens none of them for good,
    and a busy minute all of them alike, which changes no decision.
    """
    state = model.new_state()
    limit = model.config.position_limit
    context = min(_CONTEXT, (limit or _CONTEXT) // 2)
    fed, _ = model.open([0] * context, 0, state)
    model.step([StepInput(0, fed, all_logits=False)], state)
    state.commit(0, range(len(fed)))
    sizes = [size for size in nodes if limit is None or context + size <= limit]
    found, spent = dict[int, float](), 0.0
    for turn in range(_TURNS):
        if turn > _LEAST_TURNS and spent > _SECONDS:
            break
        for size in sizes or [1]:
            seconds = _step(model, state, size, clock)
            spent += seconds
            # the first turn also builds tree masks and touches the weights
            if turn:
                found[size] = min(seconds, found.get(size, math.inf))
    return found


def _step(
    model: CausalModel, state: SequenceStates, nodes: int, clock: Callable[[], float]
) -> float:
    began = clock()
    model.step([StepInput(0, [0] * nodes)], state)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    ended = clock()
    state.drop(0)
    return ended - began


def load_or_measure(
    model: CausalModel, clock: Callable[[], float] = time.perf_counter
) -> CostCurve:
    """The curve of this model's shape on this machine, from disk when it was measured before."""
    path = _cache_path(model)
    stored = _stored(path)
    if not stored.seconds:
        stored = _Stored(measure(model, clock).seconds, stored.measured + 1)
        _store(path, stored)
    return CostCurve(stored.seconds, _reading(model, CostCurve(stored.seconds)))


def _reading(model: CausalModel, curve: CostCurve) -> float:
    """Seconds of reading what a token adds to a state in floats, far slower than a step reads the weights."""
    state = model.new_state()
    each = (state.bytes_at(2 * _LONG) - state.bytes_at(_LONG)) / _LONG
    return _SLOWER * each * curve(1) / weight_bytes(model)


def doubt(model: CausalModel) -> None:
    """The rounds contradict the curve on disk: the next process measures again, twice at most."""
    path = _cache_path(model)
    stored = _stored(path)
    if stored.seconds and stored.measured < _MEASURED_AT_MOST:
        _store(path, _Stored({}, stored.measured))


@dataclass(frozen=True, slots=True)
class _Stored:
    """Seconds by nodes, none where they are to be measured; and how often that was done."""

    seconds: Mapping[int, float]
    measured: int = 0


def _store(path: Path, what: _Stored) -> None:
    # a read-only home only means measuring again next time
    with contextlib.suppress(CheckpointError):
        replace_text(path, json.dumps({"seconds": dict(what.seconds), "measured": what.measured}))


def _stored(path: Path) -> _Stored:
    """The curve in a file; none where there is none, or what is there are not the seconds of steps."""
    try:
        found = read_json(path)
        seconds = {int(n): float(s) for n, s in found["seconds"].items()}
        measured = int(found["measured"])
    except (LinspecError, AttributeError, KeyError, ValueError, TypeError):
        return _Stored({})
    sound = all(n > 0 and 0 < s < math.inf for n, s in seconds.items())
    return _Stored(seconds if sound else {}, max(0, measured))


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
