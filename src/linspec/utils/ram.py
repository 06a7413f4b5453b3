"""How much memory this process has, and how much more it can have."""

from __future__ import annotations

from pathlib import Path

from linspec.utils.control_groups import ROOT, first_line, groups_of, lines_of

# (limit, what is taken, what of that files have that were not used lately) of a group, by version
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(root: Path = ROOT) -> int | None:
    """Bytes of memory that are available without swapping; None if the system does not say.

    No more than the control groups of a container or a service leave. Pages of files count as free, mapped
    pages too: a model that was read before does not count against itself.
    """
    found = [_of_machine(root), *(_of_group(folder) for folder in groups_of("memory", root))]
    return min((each for each in found if each is not None), default=None)


def process_bytes() -> int:
    """Memory of this process; its peak where the system says no more."""
    import resource

    fields = first_line(ROOT / "proc/self/statm").split()
    if len(fields) < 2:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(fields[1]) * resource.getpagesize()


def _of_machine(root: Path) -> int | None:
    for line in lines_of(root / "proc/meminfo"):
        fields = line.split()
        if fields[:1] == ["MemAvailable:"] and len(fields) > 1 and fields[1].isdecimal():
            return int(fields[1]) * 1024
    return None


def _of_group(folder: Path) -> int | None:
    """What a group leaves of its limit; None for one without."""
    for limit, taken, files in _FILES:
        most, now = first_line(folder / limit), first_line(folder / taken)
        if most.isdecimal() and now.isdecimal():
            counted = (line.split() for line in lines_of(folder / "memory.stat"))
            cached = [int(each[1]) for each in counted if each[:1] == [files] and each[1:]]
            return max(0, int(most) - int(now) + sum(cached))
    return None
