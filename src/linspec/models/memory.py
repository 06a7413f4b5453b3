"""Whether a model fits into memory, said before it is loaded."""

from __future__ import annotations

from pathlib import Path

from linspec.errors import CheckpointError
from linspec.utils.ram import available_bytes


def check_memory(needed: int, folder: Path) -> None:
    """Raises CheckpointError if `needed` bytes are more than there are."""
    free = available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"{folder} needs {needed / 2**30:.1f} GiB of memory for its weights and {free / 2**30:.1f} GiB "
            "are free; close other programs, or quantize the model on a larger machine with "
            "`linspec quantize --bits 4`"
        )
