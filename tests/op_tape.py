"""A stand-in for CUDA graphs: records the operations on tensors, and replays them on the same memory.

As on a GPU, nothing of Python runs again in a replay: a number that a program took from Python, or that it
read from a tensor, is still that of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operations that hand what is in a tensor to Python, or whose results have sizes that depend on it
SYNCHRONISE = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")


class Tape(TorchDispatchMode):
    """The operations that ran inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if any(name.lstrip("_").startswith(each.lstrip("_")) for each in SYNCHRONISE):
            raise AssertionError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        """Run all again, into the results of the first time."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """Records programs on tapes; runs them first, as CUDA graphs need it."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, program: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, Any]:
        program()
        with Tape() as tape:
            results = program()
        self.recorded += 1
        return tape.replay, results, pool
