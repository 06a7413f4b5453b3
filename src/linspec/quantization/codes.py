"""Float weights to integer codes: W8 with a scale per output channel, W4 with a scale per 32 inputs.

    codes, scales = quantize_int4(weight, importance)

Both are symmetric. The scales of int4 are searched: a scale a little below the largest weight clips
one weight and serves the other 31 better. `importance` weighs the errors of an input by how large
that input is on real text (its second moment).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.errors import ConfigError

BITS = (8, 4)
GROUP = 32
# Largest code that a group's largest weight may be given; below 8 clips nothing, above it clips.
_REACH = [7.0 + 0.25 * i for i in range(-2, 15)]
# Weights whose candidates are tried at once: what is in between stays in the core's own cache
_AT_ONCE = 2**17


def check_bits(bits: int) -> None:
    """Raises ConfigError unless weights can have so many bits."""
    if bits not in BITS:
        raise ConfigError(f"weights can have 8 or 4 bits, got {bits}")


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes -127..127 [N, K] and float32 scales [N] of weights [N, K]."""
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    codes = (weight / _divisor(scales)[:, None]).round()
    return codes.to(torch.int8), scales


def quantize_int4(
    weight: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes -8..7 [N, K] and bfloat16 scales [N, K'/32] of weights [N, K].

    importance: [K], how much a squared error of each input's weights counts; None means all alike.
    Scales may be negative, as there is one code more below zero than above.
    """
    width = weight.shape[1]
    short = -width % GROUP
    errors = torch.ones(width) if importance is None else importance.float()
    # the floor keeps inputs that the calibration text never used from being rounded at will
    errors = errors / errors.mean().clamp_min(1e-30) + 1e-2
    groups = F.pad(errors, (0, short)).view(-1, GROUP)
    parts = [
        _search(F.pad(rows.float(), (0, short)).unflatten(1, (-1, GROUP)), groups)
        for rows in weight.split(max(1, _AT_ONCE // width))
    ]
    codes = torch.cat([part[0] for part in parts]).flatten(1)[:, :width]
    return codes.contiguous(), torch.cat([part[1] for part in parts])


def _search(weight: torch.Tensor, errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of several scales for groups [N, groups, 32]: codes likewise, scales [N, groups]."""
    largest = weight.gather(2, weight.abs().argmax(2, keepdim=True))[..., 0]
    best = torch.full(largest.shape, torch.inf)
    scales = torch.zeros_like(largest)
    for reach in _REACH:
        # the largest weight takes the side that has code -8
        scale = _refined(weight, errors, -largest / reach)
        error = _error(weight, errors, scale)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
    return _codes(weight, scales).to(torch.int8), scales.to(torch.bfloat16)


def _refined(weight: torch.Tensor, errors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The least-squares scale for the codes that `scale` gives, as bfloat16 can hold it."""
    codes = _codes(weight, scale)
    weighted = codes * errors
    fitted = (weighted * weight).sum(2) / (weighted * codes).sum(2).clamp_min(1e-30)
    fitted = torch.where(fitted.abs() > 0, fitted, scale)
    return fitted.to(torch.bfloat16).float()


def _error(weight: torch.Tensor, errors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rest = weight - _codes(weight, scale) * scale[..., None]
    return (rest.square() * errors).sum(2)


def _codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / _divisor(scale)[..., None]).round().clamp(-8, 7)


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """Scales without zeros: weights that are all zero get codes that are all zero."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
