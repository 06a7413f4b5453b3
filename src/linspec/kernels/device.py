"""Which device a name stands for, or why it cannot be had, and how much memory it has left."""

from __future__ import annotations

import torch

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.ram import available_bytes

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
            f"no CUDA device can be used as {name!r}: {torch.cuda.device_count()} are here"
            f"{_why_none()}; use cpu"
        )
    return name


def _why_none() -> str:
    """What keeps CUDA away, in brackets: the build of torch, the driver; '' where there are devices."""
    if torch.cuda.device_count():
        return ""
    if torch.version.cuda is None:
        return " (this torch was built without CUDA: install one that was)"
    try:
        torch.cuda.init()
    # a missing driver is an assertion in some builds of torch
    except (RuntimeError, AssertionError) as error:
        return f" ({shown(str(error).strip().splitlines()[0])})"
    return ""


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that tensors on a device can still have; None if the system does not say."""
    if torch.device(device).type != "cuda":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    # what torch keeps for tensors to come counts as taken there
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
