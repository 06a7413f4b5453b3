"""Whether Triton's kernels can run on a device, or what keeps them away."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from linspec.errors import ConfigError
from linspec.kernels.device import why_no_cuda
from linspec.kernels.gpu.switches import switch

INTERPRETED = "TRITON_INTERPRET"
# whether mixers call the kernels: not by themselves, as long as nobody has timed them
SWITCH, SWITCHES = "LINSPEC_TRITON", ("off", "on")
# earlier ones have no bfloat16 products
_OLDEST = (8, 0)


def chosen(device: torch.device) -> bool:
    """Whether LINSPEC_TRITON is 'on'; raises ConfigError where it is and the kernels cannot run."""
    if switch(SWITCH, SWITCHES) == "off":
        return False
    require(device)
    return True


def why_not(device: torch.device | str) -> str | None:
    """What keeps Triton's kernels from this device, with the way out; None if they run there."""
    place = torch.device(device)
    if not _installed():
        return "triton is not installed: pip install 'linspec[gpu]'"
    if os.environ.get(INTERPRETED) == "1":
        return None
    if place.type != "cuda":
        return (
            f"Triton has no code for device {place.type!r}: use a CUDA device, or set {INTERPRETED}=1 ahead "
            "of the start of Python, which interprets kernels slowly"
        )
    if not torch.cuda.is_available():
        return f"no CUDA device can be used{why_no_cuda()}"
    found = torch.cuda.get_device_capability(place)
    if found < _OLDEST:
        name = torch.cuda.get_device_name(place)
        return f"{name} has compute capability {found[0]}.{found[1]}; 8.0 is needed"
    return None


@cache
def _installed() -> bool:
    try:
        version("triton")
    except PackageNotFoundError:
        return False
    return True


def require(device: torch.device | str) -> None:
    """Raises ConfigError with what keeps Triton's kernels from this device."""
    if reason := why_not(device):
        raise ConfigError(f"Triton's kernels cannot run: {reason}")
