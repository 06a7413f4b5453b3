"""Products are timed on one core, in the cache and from memory, and told in cycles of the clock."""

from __future__ import annotations

import os

import pytest
import torch

from linspec.bench import products
from linspec.bench.products import KINDS, bench_products, last_cache_bytes
from linspec.errors import ConfigError
from linspec.kernels.cpu.library import Found, load

pytestmark = pytest.mark.skipif(load().library is None, reason="no compiled kernels")
SMALL = 3 * products.LAYER_BYTES


def test_every_kind_is_timed_in_the_cache_and_from_memory() -> None:
    found = bench_products(rows=(3,), repeats=1, memory_bytes=SMALL)
    keys = [(row.format, row.place, row.rows) for row in found.products]
    # one row is always there, as the others are told beside it
    assert keys == [(k, p, n) for k in KINDS for p in ("cache", "memory") for n in (1, 3)]
    assert all(row.cycles > 0 and row.gb_per_s > 0 for row in found.products)
    assert all(row.times_one == 1 for row in found.products if row.rows == 1)
    assert found.kernels == load().name
    assert found.clock["from"] == "measured" and 0.05 < found.clock["ghz"] < 20
    assert found.to_json()["settings"]["memory_mb"] == 3


def test_cycles_and_bytes_follow_from_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # a layer of 256 kB: 256 outputs of int8, each 32 times 32 inputs
    monkeypatch.setattr(products, "_times", lambda *args: [8192 * args[2]] * 3)
    found = bench_products(["int8"], (1, 8), ghz=2.0, memory_bytes=SMALL)
    one, eight, _, far = found.products
    assert found.clock == {"ghz": 2.0, "from": "stated"}
    assert (one.cycles, eight.cycles) == (2.0, 2.0) and (one.times_one, eight.times_one) == (1, 8)
    assert (one.gb_per_s, eight.gb_per_s) == (32.0, 4.0)
    assert far.gb_per_s == 4 * eight.gb_per_s and far.cycles == eight.cycles / 4


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="threads cannot be tied to cores here"
)
def test_afterwards_the_thread_may_run_everywhere_again() -> None:
    before = os.sched_getaffinity(0), torch.get_num_threads()
    bench_products(["int8"], (1,), repeats=1, memory_bytes=SMALL)
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before


def test_what_cannot_be_timed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'int9'.*did you mean 'int8'"):
        bench_products(["int9"])
    with pytest.raises(ConfigError, match="rows must be 1 or more and at most 512, got 0"):
        bench_products(rows=(0,))
    with pytest.raises(ConfigError, match="repeats must be 1 or more, got 0"):
        bench_products(repeats=0)
    monkeypatch.setattr(products, "load", lambda: Found(None, "torch", "LINSPEC_CPU_KERNELS=off"))
    with pytest.raises(ConfigError, match="no compiled kernels to time: LINSPEC_CPU_KERNELS=off"):
        bench_products()


def test_the_last_cache_is_known_or_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_cache_bytes() >= 2**18
    monkeypatch.setattr(os, "sysconf", lambda name: 0)
    assert last_cache_bytes() == 2**25
