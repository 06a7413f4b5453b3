"""What a speed was measured on: the first lines of every bench."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from linspec.errors import ConfigError
from linspec.kernels.cpu.threads import limit_to_quota
from linspec.utils.cores import usable_cores
from linspec.utils.messages import shown

_BANDWIDTH_BYTES = 2**28
# more threads only take turns, and the system refuses thousands of them
MOST_THREADS_A_CORE = 16


def machine(*, bandwidth: bool = False) -> dict[str, Any]:
    """Facts about this machine; `bandwidth` adds the measured GB/s of reading memory."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "ram_gb": round(_ram_bytes() / 2**30, 1),
        "os": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    if bandwidth:
        facts["read_gb_per_s"] = round(read_bandwidth(), 1)
    return facts


def set_threads(threads: int | None, name: str = "threads") -> None:
    """Let torch use this many threads; None leaves its choice, within the quota of this process.

    Raises ConfigError, which calls the number by `name`, below 1 and far above the cores.
    """
    limit_to_quota()
    if threads is None:
        return
    most = MOST_THREADS_A_CORE * usable_cores()
    if not 1 <= threads <= most:
        raise ConfigError(
            f"{name} must be 1 or more and at most {most} on {usable_cores()} cores, got "
            f"{shown(threads)}; leave them out (--threads, LINSPEC_THREADS) for all cores"
        )
    torch.set_num_threads(threads)


def cpu_name() -> str:
    """The processor as its maker calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def read_bandwidth() -> float:
    """GB/s at which all threads read a buffer that no cache holds; best of three."""
    # adding integers never waits for the sum: floats are read 10% slower
    data = torch.ones(_BANDWIDTH_BYTES // 8, dtype=torch.int64)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        data.sum()
        best = max(best, _BANDWIDTH_BYTES / (time.perf_counter() - began) / 1e9)
    return best
