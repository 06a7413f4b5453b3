"""How many processors this process may really use: those it is tied to, and its share of their time.

usable_cores()      # 16: processors that the scheduler may put it on (taskset, cpusets)
cpu_quota()         # 2.0: processors whose whole time it gets in a container, None without a limit
usable_threads()    # 2: more would only wait for each other
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PERIOD = 100_000  # microseconds, where the system does not say
_ROOT = Path("/")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_threads(root: Path = _ROOT) -> int:
    """Threads that can all run: part of a core's time does not count, but one thread always does."""
    quota = cpu_quota(root)
    return usable_cores() if quota is None else min(usable_cores(), max(1, int(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that control groups of both versions leave this process; None for all.

    A group has no more than the groups it is in. root: of the file system that is asked.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups of this process that may limit its time, with those around them."""
    for mount, own in _mounts(root):
        folder = mount / own
        while True:
            yield folder
            if folder == mount:
                break
            folder = folder.parent


def _mounts(root: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Each mounted hierarchy that knows of processor time, and where in it this process is."""
    groups = dict(_own_groups(root))
    for line in _lines(root / "proc/self/mountinfo"):
        # 36 35 98:0 /root /mount/point rw,noatime master:1 - type source options
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        limits = kind[0] == "cgroup2" or (kind[0] == "cgroup" and "cpu" in kind[2].split(","))
        own = groups.get("" if kind[0] == "cgroup2" else "cpu")
        if limits and own is not None:
            top, point = map(_plain, fields[3:5])
            yield root / point.lstrip("/"), _within(own, top)


def _own_groups(root: Path) -> Iterator[tuple[str, str]]:
    """The group of this process by controller, '' for those of version 2."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            yield name, path


def _within(group: str, top: str) -> PurePosixPath:
    """The path of a group below the group that is mounted; a container sees only its own."""
    path = PurePosixPath(group)
    inside = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
    return PurePosixPath() if ".." in inside.parts else inside


def _quota(folder: Path) -> float | None:
    second = "".join(_lines(folder / "cpu.max")[:1]).split()
    if second:
        return _cores(second[0], second[1] if len(second) > 1 else "")
    first = "".join(_lines(folder / "cpu.cfs_quota_us")[:1]).strip()
    return _cores(first, "".join(_lines(folder / "cpu.cfs_period_us")[:1]).strip())


def _cores(quota: str, period: str) -> float | None:
    """None for `max`, -1 and what is no number."""
    if not quota.isdecimal() or int(quota) == 0:
        return None
    return int(quota) / (int(period) if period.isdecimal() and int(period) else _PERIOD)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _plain(name: str) -> str:
    """A path as mountinfo writes it: spaces and the like are octal numbers there."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)
