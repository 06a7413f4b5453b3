"""Whether a model fits, said before it is loaded."""

from __future__ import annotations

from pathlib import Path

from linspec.errors import CheckpointError

_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def check_memory(needed: int, folder: Path) -> None:
    """Raises CheckpointError if `needed` bytes are more than there are."""
    free = available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"{folder} needs {needed / 2**30:.1f} GiB of memory for its weights and {free / 2**30:.1f} GiB "
            "are free; close other programs, or quantise the model on a larger machine with "
            "`linspec quantize --bits 4`"
        )
