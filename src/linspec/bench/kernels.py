"""What the kernels make of this machine: linear layers and whole steps, for each format of weights.

    report = bench_kernels("embedded-aug")
    for row in report.steps:
        print(row.format, row.nodes, row.seconds, row.of_roof)

A step reads every weight once, whatever its number of nodes, so memory is the roof: `of_roof` is the speed
at which weights are read over that at which this machine reads memory. It can pass 1 where a model is small
enough for the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.bench.machine import machine, read_bandwidth
from linspec.checkpoints.config_file import read_config_file
from linspec.checkpoints.gguf.reader import is_gguf
from linspec.checkpoints.hub import load_model, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.checkpoints.quantized import check_entry
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.models.linear import PackedLinear
from linspec.models.native_linear import NativeLinear
from linspec.policies.costs import time_steps
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.progress import Progress

FORMATS: dict[str, int | None] = {"float32": None, "int8": 8, "int4": 4}
# what a GGUF file has, where its weights stay in their blocks
OWN_BLOCKS = "blocks"
# of the inputs of a linear layer: plain decoding, and a tree that is verified
NODES = (1, 8)
# draft nodes of the whole steps that are timed
_STEP_NODES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class LinearRow:
    """Linear layers of one size. seconds: of one of them, in the quickest pass over all `layers`."""

    format: str
    outputs: int
    inputs: int
    layers: int
    nodes: int
    seconds: float
    gb_per_s: float
    of_roof: float


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of the whole model: decoding with 1 node, verifying with more.

    times_one: over the seconds of 1 node.
    """

    format: str
    nodes: int
    seconds: float
    times_one: float
    gb_per_s: float
    of_roof: float


@dataclass(frozen=True, slots=True)
class KernelSpeeds:
    """A whole run. kernels: what computes the steps, by format."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    kernels: dict[str, str]
    linears: tuple[LinearRow, ...]
    steps: tuple[StepRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def bench_kernels(
    model: str | Path,
    formats: Sequence[str] = (),
    *,
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
    roof: Callable[[], float] = read_bandwidth,
) -> KernelSpeeds:
    """Time the linear layers and the steps of a decoder on the CPU.

    formats: of the weights, all of FORMATS if empty; a quantized directory has its own only, a GGUF file
    'blocks' too. roof:
    gives the GB/s at which memory is read. Raises ConfigError for unknown formats.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be 1 or more, got {repeats}")
    chosen = _formats(model, formats)
    bandwidth = roof()
    facts = machine() | {"read_gb_per_s": _digits(bandwidth)}
    kernels, linears, steps = dict[str, str](), list[LinearRow](), list[StepRow]()
    with Progress("bench kernels", len(chosen)) as progress:
        for done, (name, bits) in enumerate(chosen.items(), 1):
            loaded = _loaded(model, name, bits)
            kernels[name] = loaded.kernels
            by_size = _by_size(loaded)
            linears += _linears(name, by_size, repeats, bandwidth, clock)
            steps += _steps(name, loaded, by_size, bandwidth, clock)
            del loaded, by_size
            progress.update(done, name)
    settings = {"model": str(model), "formats": list(chosen), "repeats": repeats}
    return KernelSpeeds(facts, settings, kernels, tuple(linears), tuple(steps))


def _formats(model: str | Path, names: Sequence[str]) -> dict[str, int | None]:
    """The bits to load with, by format."""
    known = FORMATS
    if is_gguf(resolve(model)):
        known = {OWN_BLOCKS: None, **FORMATS}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"unknown format {shown(repr(name))}; known: {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    read = read_config_file(resolve(model))
    if read.quantization is None:
        return {name: known[name] for name in names or known}
    own = f"int{check_entry(read.quantization, read.folder)}"
    if any(name != own for name in names):
        raise ConfigError(f"{model} is quantized to {own} and has no other format; leave them out")
    return {own: None}


def _loaded(model: str | Path, name: str, bits: int | None) -> Decoder:
    """A model in its inference form, with weights of one format."""
    if name == "float32":
        return load_model(model).to_inference()
    return load_for(model, bits).to_inference()


def _by_size(model: Decoder) -> dict[tuple[int, int], list[nn.Module]]:
    """The linear layers of a prepared model, by outputs and inputs."""
    found: dict[tuple[int, int], list[nn.Module]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        # a table of tokens may be a matrix too, but is not multiplied
        if isinstance(layer, NativeLinear | PackedLinear | nn.Linear) and name != "embed.layer":
            found.setdefault((layer.out_features, layer.in_features), []).append(layer)
    return found


def weight_bytes(layer: nn.Module) -> int:
    """What a product has to read of the memory for this layer's weights."""
    if isinstance(layer, NativeLinear):
        return sum(t.nbytes for t in (layer.packed, layer.scales) if isinstance(t, torch.Tensor))
    if isinstance(layer, PackedLinear):
        return 4 * layer.out_features * layer.in_features
    assert isinstance(layer, nn.Linear)
    return layer.weight.nbytes


def _linears(
    name: str,
    by_size: dict[tuple[int, int], list[nn.Module]],
    repeats: int,
    roof: float,
    clock: Callable[[], float],
) -> Iterator[LinearRow]:
    for (outputs, inputs), layers in sorted(by_size.items()):
        size = sum(map(weight_bytes, layers))
        for nodes in NODES:
            seconds = _pass_seconds(layers, torch.ones(nodes, inputs), repeats, clock)
            speed = size / seconds / 1e9
            each = seconds / len(layers)
            yield LinearRow(
                name,
                outputs,
                inputs,
                len(layers),
                nodes,
                each,
                _digits(speed),
                _digits(speed / roof),
            )


@torch.inference_mode()
def _pass_seconds(
    layers: Sequence[nn.Module], x: torch.Tensor, repeats: int, clock: Callable[[], float]
) -> float:
    """The quickest pass of `x` through one layer after the other; the first pass warms up."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        for layer in layers:
            layer(x)
        times.append(clock() - began)
    return max(min(times[1:]), 1e-9)


def _steps(
    name: str,
    model: Decoder,
    by_size: dict[tuple[int, int], list[nn.Module]],
    roof: float,
    clock: Callable[[], float],
) -> Iterator[StepRow]:
    size = sum(weight_bytes(layer) for layers in by_size.values() for layer in layers)
    found = time_steps(model, _STEP_NODES, clock)
    for nodes, seconds in sorted(found.items()):
        speed = size / seconds / 1e9
        yield StepRow(
            format=name,
            nodes=nodes,
            seconds=seconds,
            times_one=_digits(seconds / found[1]),
            gb_per_s=_digits(speed),
            of_roof=_digits(speed / roof),
        )


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
