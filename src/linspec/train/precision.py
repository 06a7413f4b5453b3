"""In which precision training computes: products in bfloat16 under autocast, or all in float32.

Weights, gradients and the optimizer's moments are float32 in both, and so are the sums of a loss.
"""

from __future__ import annotations

import torch

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

PRECISIONS = ("auto", "bf16", "float32")


def check_precision(precision: object) -> None:
    """Raise ConfigError unless this is a precision of training."""
    if precision in ("fp16", "float16", "half"):
        raise ConfigError(
            f"precision {precision} is not trained in: small gradients become zero there; take bf16, which "
            "has the range of float32"
        )
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision must be auto, bf16 or float32, got {shown(repr(precision))}"
            f"{did_you_mean(precision, PRECISIONS)}"
        )


def fast_bfloat16(device: torch.device) -> bool:
    """True when bfloat16 matrix products are quicker than float32 on `device`."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return False
    # without these instructions bfloat16 products are emulated, several times slower than float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def computed_in(precision: str, device: torch.device) -> str:
    """'bf16' or 'float32': what 'auto' means on this device, or what was asked for."""
    if precision != "auto":
        return precision
    return "bf16" if fast_bfloat16(device) else "float32"
