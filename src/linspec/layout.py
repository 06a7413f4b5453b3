"""Who sees whom when the nodes of a step meet the rows of a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from linspec.tree import ancestor_matrix


@dataclass(frozen=True)
class Layout:
    """Who sees whom in one step, for the rows of one segment. Shared by all layers of a state.

    offsets [R, N]: position of each new node, counted from the row's origin.
    columns [R, C]: position of each buffer row, likewise; visible [R, N, C]: committed rows and a
    node's own ancestors. `plain` says that every column is visible to every node.
    """

    offsets: torch.Tensor
    columns: torch.Tensor
    visible: torch.Tensor
    plain: bool
    _memo: dict[Any, Any] = field(default_factory=dict)

    def memo(self, key: Any, build: Callable[[], Any]) -> Any:
        """`build()` once per layout: mixers keep their masks here."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]


def build_layout(rows: Sequence[tuple[int, tuple[int, ...], int]], device: torch.device) -> Layout:
    """Layout of rows given as (committed rows, parents of all staged rows, how many are new)."""
    if len(rows) == 1:
        return _single_layout(*rows[0], device)
    count, nodes = len(rows), max(new for *_, new in rows)
    width = max(base + len(parents) for base, parents, _ in rows)
    offsets = torch.zeros(count, nodes, dtype=torch.long)
    columns = torch.arange(width).repeat(count, 1)
    visible = torch.zeros(count, nodes, width, dtype=torch.bool)
    for i, (base, parents, new) in enumerate(rows):
        total = base + len(parents)
        seen = ancestor_matrix(parents)
        depths = base + seen.sum(1) - 1
        offsets[i, :new] = depths[len(parents) - new :]
        columns[i, base:total] = depths
        visible[i, :new, :base] = True
        visible[i, :new, base:total] = seen[len(parents) - new :]
    plain = bool(visible.all())
    return Layout(offsets.to(device), columns.to(device), visible.to(device), plain)


def _single_layout(base: int, parents: tuple[int, ...], new: int, device: torch.device) -> Layout:
    """As `build_layout` for one row, in few operators: batch 1 takes this path every round."""
    seen = ancestor_matrix(parents)
    depths = base + seen.sum(1) - 1
    columns = torch.cat((torch.arange(base), depths))
    visible = torch.nn.functional.pad(seen[len(parents) - new :], (base, 0), value=True)
    offsets = depths[len(parents) - new :]
    plain = len(parents) == 1
    return Layout(
        offsets[None].to(device), columns[None].to(device), visible[None].to(device), plain
    )
