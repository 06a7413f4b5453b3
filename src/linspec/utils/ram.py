"""How much memory this machine has left."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Bytes of memory that are available without swapping; None if the system does not say.

    Pages of files count as free, mapped pages too: a model that was read before does not count
    against itself.
    """
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
