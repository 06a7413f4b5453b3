"""Keys in two bits: where each feature of a key is between the least and the greatest of its page.

    least, greatest, codes = encode(keys)      # [..., page, K] -> [..., K] twice, and [..., page, K]
    products(queries, keys)                    # the greatest product of each query with a decoded key

What a code says is least + code · (greatest - least) / 3, with the extremes as bfloat16, rounded away from
each other. A query meets codes as whole numbers, so its products are the same in whatever order they
are added up: `kernels/cpu/csrc/codes.inc.h` has the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.quantization import rows

# features that are added up side by side
_SIDE_BY_SIDE = 16


def rounded_out(greatest: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As bfloat16 has them, away from each other: half the memory, and bounds as before."""
    return _away(greatest, above=True), _away(least, above=False)


def _away(x: torch.Tensor, *, above: bool) -> torch.Tensor:
    bits = x.detach().float().contiguous().view(torch.int32)
    # a larger magnitude lies further above for numbers without sign, and further below for others
    larger = ((bits >= 0) == above).int()
    return ((bits + 0xFFFF * larger) & ~0xFFFF).view(torch.float32).to(x.dtype)


def encode(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The least and greatest keys [..., K] of pages [..., page, K], and codes 0..3 of all keys: float32."""
    keys = keys.float()
    greatest, least = rounded_out(keys.amax(-2), keys.amin(-2))
    inverse = torch.full_like(least, 3) / (greatest - least)
    thirds = (keys - least[..., None, :]) * inverse[..., None, :]
    # a feature that is the same in all keys is not a number here
    return least, greatest, thirds.nan_to_num(0.0).clamp(0, 3).round()


@torch.no_grad()
def products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The greatest product of queries [..., N, K] with decoded keys of a page [..., page, K]: [..., N]."""
    queries = queries.float()
    least, greatest, codes = encode(keys)
    third = (greatest - least) * (1 / 3)
    # in one scale for each query and page, as the rows of an int8 cache
    whole, scale = rows.whole(queries * third[..., None, :])
    # below 2^24: exact in whatever order
    most = (whole @ codes.mT).amax(-1)
    return most * scale[..., 0] + _added_up(queries * least[..., None, :])


def _added_up(x: torch.Tensor) -> torch.Tensor:
    """The sums of x [..., K], in the order of sixteen that kernels have."""
    parts = F.pad(x, (0, -x.shape[-1] % _SIDE_BY_SIDE)).split(_SIDE_BY_SIDE, dim=-1)
    sums = torch.zeros_like(parts[0])
    for part in parts:
        sums = sums + part
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]
