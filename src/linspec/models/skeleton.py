"""Modules without memory for their weights, which are loaded later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithoutDraws(TorchFunctionMode):
    """Initial values are not drawn: on the meta device that alone would import torch's compiler."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(function, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return function(*args, **given)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Inside, new modules get shapes only (device meta), at once."""
    with torch.device("meta"), _WithoutDraws():
        yield
