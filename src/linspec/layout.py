"""Who sees whom when the nodes of a step meet the rows of a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from linspec.tree import ancestor_matrix

# of each row: committed rows, parents of all staged rows, how many of those are new
Rows = Sequence[tuple[int, tuple[int, ...], int]]


@dataclass(frozen=True)
class Layout:
    """Who sees whom in one step, for the rows of one segment. Shared by all layers of a state.

    offsets [R, N]: position of each new node, counted from the row's origin.
    columns [R, C]: position of each buffer row, likewise; visible [R, N, C]: committed rows and a
    node's own ancestors. `plain` says that every column is visible to every node. `rows` is what it
    was built from.
    """

    offsets: torch.Tensor
    columns: torch.Tensor
    visible: torch.Tensor
    plain: bool
    rows: Rows
    _memo: dict[Any, Any] = field(default_factory=dict)

    def memo(self, key: Any, build: Callable[[], Any]) -> Any:
        """`build()` once per layout: mixers keep their masks here."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]

    def ancestry(self) -> torch.Tensor:
        """[R, C, C]: true where the second buffer row is the first or lies before it on its path."""
        found: torch.Tensor = self.memo("ancestry", self._ancestry)
        return found

    def _ancestry(self) -> torch.Tensor:
        width = self.columns.shape[1]
        seen = torch.zeros(len(self.rows), width, width, dtype=torch.bool)
        for i, (base, parents, _) in enumerate(self.rows):
            chain = (*range(-1, base - 1), *(p + base for p in parents))
            seen[i, : len(chain), : len(chain)] = ancestor_matrix(chain)
        return seen.to(self.columns.device)


def build_layout(rows: Rows, device: torch.device) -> Layout:
    """Layout of rows given as (committed rows, parents of all staged rows, how many are new)."""
    if len(rows) == 1:
        return _single_layout(rows, device)
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
    return Layout(offsets.to(device), columns.to(device), visible.to(device), plain, rows)


def _single_layout(rows: Rows, device: torch.device) -> Layout:
    """As `build_layout` for one row, in few operators: batch 1 takes this path every round."""
    base, parents, new = rows[0]
    seen = ancestor_matrix(parents)
    depths = base + seen.sum(1) - 1
    columns = torch.cat((torch.arange(base), depths))
    visible = torch.nn.functional.pad(seen[len(parents) - new :], (base, 0), value=True)
    offsets = depths[len(parents) - new :]
    plain = len(parents) == 1
    return Layout(
        offsets[None].to(device), columns[None].to(device), visible[None].to(device), plain, rows
    )
