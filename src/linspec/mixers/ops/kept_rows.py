"""Rows that are kept where other mixers keep sums: a key, a value, and a 1 that says that it is there."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def row_columns(width: int) -> int:
    """Columns of a row, of keys and values of `width` features."""
    return 2 * width + 1


def pack_rows(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Keys and values [..., K] as rows [..., 2 K + 1]."""
    return F.pad(torch.cat((keys, values), dim=-1), (0, 1), value=1.0)


def unpack_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [..., K] of rows [..., 2 K + 1], and [..., 1] where they are there; zeros are not."""
    width = rows.shape[-1] // 2
    keys, values, there = rows.split((width, width, 1), dim=-1)
    return keys, values, there > 0
