"""What the attention kernel takes."""

from __future__ import annotations

import torch

from linspec.errors import ConfigError
from linspec.kernels.gpu.reach import Reach
from linspec.kernels.gpu.reads import check_weights

# features of a head, which a program has all at once
_WIDEST = 256
_QUERIES = (torch.float32, torch.bfloat16)
_ROWS_OF = (*_QUERIES, torch.float16)


def check_inputs(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, weights: str) -> None:
    """Raises ConfigError for queries, rows and weights that the kernel does not know."""
    check_weights(weights)
    widths = (keys.shape[3], values.shape[3])
    if max(widths) > _WIDEST:
        raise ConfigError(f"tree_attention takes heads of at most {_WIDEST} features, got {widths}")
    if q.dtype not in _QUERIES or {keys.dtype, values.dtype} - set(_ROWS_OF):
        kinds = ", ".join(str(each.dtype) for each in (q, keys, values))
        raise ConfigError(
            "tree_attention takes queries in float32 or bfloat16, keys and values in these or float16, got "
            f"{kinds}"
        )
    if not all(rows.stride(-1) == 1 for rows in (q, keys, values)):
        raise ConfigError(
            "tree_attention takes rows whose features lie side by side; use contiguous()"
        )


def check_sinks(
    sinks: int,
    weights: str,
    unit: bool,
    reach: Reach,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor | None,
    bases: torch.Tensor | None,
) -> None:
    """Raises ConfigError for sinks that the kernel cannot read."""
    if not sinks:
        return
    if weights != "softmax" or unit or sinks > reach.group:
        raise ConfigError(
            f"tree_attention takes sinks from the first of groups with softmax weights of keys as they are, "
            f"got {sinks} of groups of {reach.group} with {weights}{' of length 1' if unit else ''}"
        )
    shape = (keys.shape[1], 2, sinks, keys.shape[3])
    if kept is None or bases is None or kept.shape[1:] != shape or kept.stride(-1) != 1:
        raise ConfigError(
            f"tree_attention takes sinks [slots, {', '.join(map(str, shape))}] with columns side by side, "
            f"and bases, got {None if kept is None else list(kept.shape)} and "
            f"{'none' if bases is None else 'some'}"
        )
    if {kept.dtype, values.dtype} != {keys.dtype} or values.shape[3] != keys.shape[3]:
        raise ConfigError("tree_attention takes sinks, keys and values of one dtype and width")
