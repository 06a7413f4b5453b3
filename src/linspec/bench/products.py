"""What one core makes of a product of weights and a few rows, for each kind of weights.

    report = bench_products(["int8", "int4"])
    for row in report.products:
        print(row.format, row.place, row.rows, row.cycles)

A product is timed from the cache (weights that stay in a core's second cache) and from memory (more than
four times the last cache, read once in a row). `cycles` are those that a row takes for 32 weights: what is
left of the clock's promises, whatever the size of the layer. The packing of the rows is not part of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import CDLL, POINTER, byref, c_int32, c_int64, c_void_p
from dataclasses import asdict, dataclass
from typing import Any

import torch

from linspec.bench.machine import machine
from linspec.errors import ConfigError
from linspec.kernels.cpu import pack
from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.linear import linear_struct
from linspec.kernels.cpu.structs import TILE, LinearStruct
from linspec.kernels.step_plan import BF16, F32, INT4, INT8, LinearPlan
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.progress import Progress

KINDS = {"float32": F32, "bfloat16": BF16, "int8": INT8, "int4": INT4}
ROWS = (1, 2, 4, 8, 16)
MOST_ROWS = 512
INPUTS = 1024
# a quarter of a mebibyte stays in the second cache of every processor that these kernels know
CACHE_BYTES = 2**18
# layers that are read from memory: long enough for the clock, short enough to be undisturbed now and then
LAYER_BYTES = 2**20
_FALLBACK_LAST_CACHE = 2**25
_MOST_MEMORY_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class ProductRow:
    """One product. place: cache or memory. cycles: for 32 weights and a row. times_one: over one row."""

    format: str
    place: str
    rows: int
    gb_per_s: float
    cycles: float
    times_one: float


@dataclass(frozen=True, slots=True)
class ProductSpeeds:
    """A whole run. clock: the GHz that cycles are counted by, and where they come from."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    kernels: str
    clock: dict[str, Any]
    products: tuple[ProductRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def bench_products(
    formats: Sequence[str] = (),
    rows: Sequence[int] = ROWS,
    *,
    repeats: int = 20,
    ghz: float | None = None,
    memory_bytes: int | None = None,
    seed: int = 0,
) -> ProductSpeeds:
    """Time products on one core, with the kernels that LINSPEC_CPU_KERNELS asks for.

    formats: of KINDS, all if empty. ghz: the clock, None to measure it. memory_bytes: of the weights
    that are read from memory, None for four times the last cache. Raises ConfigError where there are
    no kernels, and for unknown formats.
    """
    kinds, counts = _kinds(formats), _row_counts(rows)
    if repeats < 1:
        raise ConfigError(f"repeats must be 1 or more, got {repeats}")
    found = load()
    if found.library is None:
        raise ConfigError(f"there are no compiled kernels to time: {found.reason}")
    # before this thread is tied to one core, which torch would take for all there are
    library, facts = _declared(found.library), machine()
    far = memory_bytes or min(4 * last_cache_bytes(), _MOST_MEMORY_BYTES)
    speed = _digits(ghz or measured_ghz(library))
    clock = {"ghz": speed, "from": "stated" if ghz else "measured"}
    products = list[ProductRow]()
    with _on_one_core(), Progress("bench kernels", 2 * len(kinds)) as progress:
        for done, name in enumerate(kinds):
            for place, size in (("cache", CACHE_BYTES), ("memory", far)):
                progress.update(2 * done + (place == "memory"), f"{name}, {place}")
                near = place == "cache"
                layers = _layers(KINDS[name], size if near else LAYER_BYTES, size, seed)
                times = {n: _quick(_times(library, layers, n, repeats, seed)) for n in counts}
                products += _rows(name, place, times, layers[0], speed)
    settings = {
        "formats": kinds, "rows": counts, "inputs": INPUTS, "repeats": repeats, "seed": seed,
        "cache_mb": CACHE_BYTES / 2**20, "memory_mb": far / 2**20, "threads": 1,
    }  # fmt: skip
    return ProductSpeeds(facts, settings, found.name, clock, tuple(products))


def _kinds(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in KINDS:
            raise ConfigError(
                f"unknown format {shown(repr(name))}; known: {', '.join(KINDS)}"
                f"{did_you_mean(name, KINDS)}"
            )
    return list(dict.fromkeys(names)) or list(KINDS)


def _row_counts(rows: Sequence[int]) -> list[int]:
    for count in rows:
        if not 1 <= count <= MOST_ROWS:
            raise ConfigError(f"rows must be 1 or more and at most {MOST_ROWS}, got {count}")
    # the ratio needs one row
    return sorted({1, *rows})


def _layers(kind: int, size: int, total: int, seed: int) -> list[LinearPlan]:
    """Layers of about `size` bytes each and `total` bytes together, at addresses of their own."""
    one = _weights(kind, TILE, seed)
    tiles = max(1, size // one.nbytes)
    count = max(1, total // (tiles * one.nbytes))
    weights = one.repeat(count * tiles, *(1 for _ in one.shape[1:])).unflatten(0, (count, tiles))
    outputs = tiles * TILE
    scales = torch.ones(outputs) if kind == INT8 else None
    return [LinearPlan(kind, outputs, INPUTS, each, scales) for each in weights]


def _weights(kind: int, outputs: int, seed: int) -> torch.Tensor:
    """Random packed weights of one tile."""
    generator = torch.Generator().manual_seed(seed)
    if kind in (F32, BF16):
        values = torch.randn(outputs, INPUTS, generator=generator)
        return pack.pack_floats(values if kind == F32 else values.to(torch.bfloat16))
    most = 127 if kind == INT8 else 7
    codes = torch.randint(-most, most + 1, (outputs, INPUTS), generator=generator).to(torch.int8)
    if kind == INT8:
        return pack.pack_int8(codes, torch.ones(outputs))[0]
    return pack.pack_int4(codes, torch.ones(outputs, INPUTS // TILE, dtype=torch.bfloat16))


def _rows(
    name: str, place: str, times: Mapping[int, int], plan: LinearPlan, ghz: float
) -> Iterator[ProductRow]:
    """times: nanoseconds by rows."""
    for rows, ns in times.items():
        shares = plan.outputs * plan.inputs / 32 * rows
        yield ProductRow(
            format=name,
            place=place,
            rows=rows,
            gb_per_s=_digits(plan.weights.nbytes / ns),
            cycles=_digits(ns * ghz / shares),
            times_one=_digits(ns / times[1]),
        )


def _quick(times: Sequence[int]) -> int:
    """The slowest of the quickest tenth: on a busy machine most of many layers are disturbed."""
    return sorted(times)[len(times) // 10]


def _times(
    library: CDLL, layers: Sequence[LinearPlan], rows: int, repeats: int, seed: int
) -> list[int]:
    """Nanoseconds of each layer: the least of many where there is one, else one after the other, twice."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, INPUTS, generator=generator)
    y = torch.empty(rows, layers[0].outputs)
    structs = [linear_struct(plan) for plan in layers]
    space = torch.empty(library.ls_linear_workspace(byref(structs[0]), rows), dtype=torch.uint8)
    alone = len(layers) == 1
    return [
        max(
            1,
            library.ls_product_ns(
                byref(struct),
                *(x.data_ptr(), rows, y.data_ptr(), space.data_ptr()),
                10 * repeats if alone else 1,
            ),
        )
        for _ in range(1 if alone else 2)
        for struct in structs
    ]


def measured_ghz(library: CDLL) -> float:
    """Cycles in a nanosecond, by additions of which each waits for the one before."""
    count = 100_000
    return count / max(1, min(library.ls_additions_ns(count) for _ in range(30)))


def last_cache_bytes() -> int:
    """Bytes of the largest cache, as the system says; 32 MB where it says nothing."""
    known = [name for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if _has(name)]
    return max([os.sysconf(name) for name in known], default=0) or _FALLBACK_LAST_CACHE


def _has(name: str) -> bool:
    return name in getattr(os, "sysconf_names", {})


@contextmanager
def _on_one_core() -> Iterator[None]:
    """This thread stays on the core where it is, as caches and clocks are a core's own."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _declared(library: CDLL) -> CDLL:
    library.ls_product_ns.restype = c_int64
    library.ls_product_ns.argtypes = [
        POINTER(LinearStruct),
        *(c_void_p, c_int32),
        *(c_void_p, c_void_p, c_int32),
    ]
    library.ls_additions_ns.restype = c_int64
    library.ls_additions_ns.argtypes = [c_int32]
    return library


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
