"""What a model takes of the memory, and whether it fits, said before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from linspec.errors import CheckpointError
from linspec.kernels.device import free_bytes


def weight_bytes(model: Any) -> int:
    """What the weights of a model take in memory, packed ones too."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(each.nbytes for each in {id(each): each for each in tensors}.values())


def check_memory(needed: int, folder: Path, device: torch.device | str = "cpu") -> None:
    """Raises CheckpointError if `needed` bytes are more than there are where tensors of `device` lie."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise CheckpointError(
            f"{folder} needs {needed / 2**30:.1f} GiB of memory for its weights and {free / 2**30:.1f} GiB "
            f"are free{_on(device)}; close other programs, or quantize the model on a larger machine with "
            "`linspec quantize --bits 4`"
        )


def _on(device: torch.device | str) -> str:
    kind = torch.device(device).type
    return "" if kind == "cpu" else f" on {device}"
