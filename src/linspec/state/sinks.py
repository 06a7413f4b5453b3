"""The state of heads that see near tokens and the first ones of the text: groups, and *sinks*.

The sinks are the first rows of the first group. When that closes they move to where other states keep their
sums, in the format of all entries: the bytes of their keys, behind them those of their values, and a 1 in the
last number that says that they are there. So nodes read them alike before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.state.contract import StateOptions
from linspec.state.entries import EntryFormat
from linspec.state.grouped import GroupedSpec, GroupedState


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkSpec(GroupedSpec):
    """sum_width: sinks. sum_columns: a key, a value, and one number more."""


class SinkState(GroupedState):
    """Groups that are forgotten when they close, but for the sinks."""

    spec: SinkSpec

    def __init__(
        self,
        spec: SinkSpec,
        layers: int,
        slots: int,
        options: StateOptions,
        entries: EntryFormat | None = None,
    ) -> None:
        super().__init__(spec, [keep_first] * layers, slots, options, entries)

    def sums_of(self, kept: torch.Tensor) -> torch.Tensor:
        """What is kept [.., Hkv, s, 2 K + 1] as rows of features: key, value, and 1 where they are there."""
        features = self.entries.decode(self.rows_of(kept), self.spec.key_width, self.dtype)
        there = kept[..., -1:, -1:].expand(*kept.shape[:-1], 1)
        return torch.cat((*features.to(kept.dtype).unbind(-3), there), dim=-1)

    def rows_of(self, kept: torch.Tensor) -> torch.Tensor:
        """What is kept as entries [.., Hkv, 2, s, .] of keys and of values, in the same memory."""
        width, count = self.keys.shape[-1], self.spec.sum_width
        rows = kept.flatten(-2).view(self.keys.dtype)
        return rows[..., : 2 * count * width].unflatten(-1, (2, count, width))


def keep_first(sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sums [Hkv, s, 2 K + 1] once a group of entries [Hkv, G, .] has closed: its rows, if it is the first."""
    count = sums.shape[1]
    first = torch.zeros_like(sums)
    # entries of the same width: whatever format they have, both take the same bytes
    rows = torch.cat((keys[:, :count], values[:, :count]), dim=1).contiguous()
    raw = rows.view(torch.uint8).flatten(1)
    _bytes(first)[:, : raw.shape[1]] = raw
    first[:, -1, -1] = 1
    return torch.where(sums[:, -1:, -1:] > 0, sums, first)


def _bytes(sums: torch.Tensor) -> torch.Tensor:
    """[.., s, 2 K + 1] numbers as bytes, those of one head side by side."""
    return sums.flatten(-2).view(torch.uint8)
