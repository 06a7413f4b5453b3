"""What a layer of each mixer costs: `linspec list --measure`, kept for the `linspec list` after it.

A layer is measured as the difference of two stacks, so that the output layer and the way into a step do not
count; its MLP does.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from linspec.bench.machine import machine
from linspec.decoding.step import StepInput
from linspec.errors import CheckpointError, LinspecError
from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.structs import ABI
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.utils.border import read_json
from linspec.utils.files import cache_dir, replace_text
from linspec.utils.progress import Progress

CONTEXT = 2048
# the shape of the embedded models, but for the vocabulary, which costs nothing here
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "width": 256,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 64,
    "mlp_width": 688,
    "max_positions": 2 * CONTEXT,
}
_LAYERS = (2, 8)
_REPEATS = 30
# what mixers need beside their defaults
_SETTINGS: dict[str, dict[str, Any]] = {
    "aug": {"taps": 32},
    "window": {"window": 256},
    "by-head": {"exact_heads": (0,), "sinks": 4},
    "streaming": {"sinks": 4},
}


def measure_mixers(
    context: int = CONTEXT, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Microseconds of a token and layer of every causal mixer after `context` tokens, kept on disk."""
    names = [entry.name for entry in MIXERS if MIXERS[entry.name].causal]
    found: dict[str, float] = {}
    with Progress("mixers measured", len(names)) as progress:
        for done, name in enumerate(names, 1):
            # one of another package may need settings that nobody knows here
            with contextlib.suppress(LinspecError):
                found[name] = round(1e6 * layer_seconds(name, context, clock), 2)
            progress.update(done, name)
    # a read-only home only means measuring again next time
    with contextlib.suppress(CheckpointError):
        replace_text(_path(), json.dumps({"on": _here(), "context": context, "us": found}))
    return found


def measured_mixers() -> Mapping[str, float]:
    """What `measure_mixers` found here before; empty where it did not, or with other kernels."""
    path = _path()
    if not path.is_file():
        return {}
    try:
        data = read_json(path)
        return {str(k): float(v) for k, v in data["us"].items()} if data["on"] == _here() else {}
    except (LinspecError, KeyError, AttributeError, TypeError, ValueError):
        return {}


def layer_seconds(name: str, context: int, clock: Callable[[], float]) -> float:
    """Seconds of one token in one layer of the mixer `name`; noise only adds, so the least of some."""
    few, many = (_step_seconds(name, layers, context, clock) for layers in _LAYERS)
    return max(0.0, many - few) / (_LAYERS[1] - _LAYERS[0])


@torch.inference_mode()
def _step_seconds(name: str, layers: int, context: int, clock: Callable[[], float]) -> float:
    mixer = MixerConfig(name=name, **_SETTINGS.get(name, {}))
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(layers=layers, mixers=(mixer,) * layers, **SHAPE)).to_inference()
    state = model.new_state()
    model.step([StepInput(0, [at % 64 for at in range(context)], all_logits=False)], state)
    state.commit(0, range(context))
    times = []
    for _ in range(_REPEATS):
        began = clock()
        model.step([StepInput(0, [1])], state)
        times.append(clock() - began)
        state.drop(0)
    return min(times)


def _here() -> dict[str, Any]:
    """On what the times depend."""
    facts = machine()
    return {
        **{name: facts[name] for name in ("cpu", "threads", "torch")},
        "kernels": f"{load().name} {ABI}",
    }


def _path() -> Path:
    return cache_dir() / "mixers.json"
