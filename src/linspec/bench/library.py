"""What runs here: `linspec info`, versions, devices and the kernels that will be used."""

from __future__ import annotations

import platform
from functools import partial
from importlib import metadata
from typing import Any

import torch

from linspec.bench.machine import cpu_name
from linspec.bench.switches import DEVICE_SWITCHES, Told
from linspec.kernels.cpu.library import load
from linspec.kernels.gpu.switches import switch
from linspec.kernels.gpu.triton.available import why_not as why_no_triton
from linspec.kernels.selector import pick_kernel
from linspec.utils.cores import cpu_quota, usable_cores
from linspec.utils.files import cache_dir


def info(threads: int | None = None) -> dict[str, Any]:
    """What `linspec info` prints; `errors`, if there are any, are the switches that are wrong.

    threads: to compute with; None for those of the environment.
    """
    # training brings libraries that take half a second to import
    from linspec.train.precision import fast_bfloat16

    device, told = "cuda" if torch.cuda.is_available() else "cpu", Told()
    told.switches(threads)
    facts: dict[str, Any] = {
        "version": package_version("linspec"),
        "torch": torch.__version__,
        "device": device,
        "kernels": {
            "linear": told.by(lambda: _linear(device), None),
            "native": told.by(_native, None),
            **{
                fact: {"switch": told.by(partial(switch, *each), None)}
                for fact, each in DEVICE_SWITCHES.items()
            },
        },
        "threads": torch.get_num_threads(),
        "fast_bfloat16": fast_bfloat16(torch.device(device)),
        "python": platform.python_version(),
        "transformers": package_version("transformers"),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "cpu_quota": cpu_quota(),
        "cache": str(cache_dir()),
    }
    facts["kernels"]["triton"]["missing"] = why_no_triton(device)
    return {**facts, "errors": told.errors} if told.errors else facts


def _linear(device: str) -> dict[str, str]:
    kernel = pick_kernel(torch.zeros(1, device=device))
    return {"name": kernel.name, "reason": kernel.reason}


def _native() -> dict[str, str]:
    found = load()
    return {"name": found.name, "reason": found.reason}


def package_version(name: str) -> str:
    """Installed version of a package, 'unknown' for a source tree that is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
