"""Which device a name stands for, or why it cannot be had."""

from __future__ import annotations

import torch

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

NAMES = ("cpu", "cuda", "auto")


def pick_device(name: str) -> str:
    """The device for 'cpu', 'cuda' or 'auto'; raises ConfigError for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # a number would be an accelerator of its own
        if not isinstance(name, str):
            raise TypeError(name)
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"unknown device {shown(repr(name))}; use cpu, cuda or auto{did_you_mean(name, NAMES)}"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {shown(repr(name))} is not supported; use cpu, cuda or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"no CUDA device can be used as {name!r}: {torch.cuda.device_count()} are here; use cpu"
        )
    return name
