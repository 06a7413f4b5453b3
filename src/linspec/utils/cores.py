"""How many processors this process may really use: those it is tied to, and its share of their time.

usable_cores()      # 16: processors that the scheduler may put it on (taskset, cpusets)
cpu_quota()         # 2.0: processors whose whole time it gets in a container, None without a limit
usable_threads()    # 2: more would only wait for each other
"""

from __future__ import annotations

import os
from pathlib import Path

from linspec.utils.control_groups import ROOT, first_line, groups_of

_PERIOD = 100_000  # microseconds, where the system does not say


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_threads(root: Path = ROOT) -> int:
    """Threads that can all run: part of a core's time does not count, but one thread always does."""
    quota = cpu_quota(root)
    return usable_cores() if quota is None else min(usable_cores(), max(1, int(quota)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that control groups of both versions leave this process; None for all.

    A group has no more than the groups it is in. root: of the file system that is asked.
    """
    quotas = [quota for folder in groups_of("cpu", root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    second = first_line(folder / "cpu.max").split()
    if second:
        return _cores(second[0], second[1] if len(second) > 1 else "")
    first = first_line(folder / "cpu.cfs_quota_us")
    return _cores(first, first_line(folder / "cpu.cfs_period_us"))


def _cores(quota: str, period: str) -> float | None:
    """None for `max`, -1 and what is no number."""
    if not quota.isdecimal() or int(quota) == 0:
        return None
    return int(quota) / (int(period) if period.isdecimal() and int(period) else _PERIOD)
