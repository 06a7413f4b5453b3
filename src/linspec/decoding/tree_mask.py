"""The attention mask of one step: which cached and staged positions each new node may attend to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from linspec.decoding.tree import Shape

# (committed rows, shape of all staged rows, how many of these are new) of each slot
Rows = Sequence[tuple[int, Shape, int]]


@dataclass(frozen=True, eq=False)
class StagedTree:
    """The staged nodes of one slot alone, wherever they stand: many tree_masks share one.

    seen [N, S]: the staged ancestors of each new node, itself included; depths [S] of all staged
    nodes, and the greatest of the new ones.
    """

    seen: torch.Tensor
    depths: torch.Tensor
    deepest: int
    _memo: dict[Hashable, Any] = field(default_factory=dict)

    def memo(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """`build()` once per tree: what depends neither on the slot nor on its rows."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]


@lru_cache(maxsize=256)
def staged_tree(shape: Shape, new: int, device: torch.device) -> StagedTree:
    """The tree of staged rows of `shape`, of which the last `new` are new."""
    first = len(shape) - new
    deepest = max(shape.depths[first:], default=0)
    depths = torch.tensor(shape.depths, dtype=torch.long, device=device)
    return StagedTree(shape.ancestors[first:].to(device), depths, deepest)


class TreeMask:
    """Who sees whom in one step, for the rows of one dense_group. Layers with equal rows share it.

    Positions count from each slot's base_position. plain: every column is visible to every node. deepest:
    the greatest position of a new node. tree: the staged nodes, for a single slot. committed: so many
    columns are committed in every slot, each that of its position. static: its tensors get other values
    without it, so that nothing may be decided by what is in them; see StaticTreeMask. reader: kernels of a
    device that read what the mask says, a `StepReader`; None without.
    """

    static: ClassVar[bool] = False
    reader: Any = None

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.rows, self.device = rows, device
        trees = [staged_tree(shape, new, device) for _, shape, new in rows]
        self.tree = trees[0] if len(rows) == 1 else None
        self.width = max(base + len(shape) for base, shape, _ in rows)
        self.deepest = max(row[0] + tree.deepest for row, tree in zip(rows, trees, strict=True))
        self.committed = min(base for base, *_ in rows)
        self.plain = all(row[0] + 1 == self.width and len(row[1]) == 1 for row in rows)
        self._memo: dict[Hashable, Any] = {}

    @cached_property
    def offsets(self) -> torch.Tensor:
        """[R, N]: the position of each new node."""
        if self.tree is not None:
            base, _, new = self.rows[0]
            return (self.tree.depths[len(self.tree.depths) - new :] + base)[None]
        return self._ragged[0]

    @cached_property
    def columns(self) -> torch.Tensor:
        """[R, C]: the position of each buffer row."""
        if self.tree is not None:
            base = self.rows[0][0]
            return torch.cat((torch.arange(base, device=self.device), self.tree.depths + base))[
                None
            ]
        return self._ragged[1]

    @cached_property
    def visible(self) -> torch.Tensor:
        """[R, N, C]: committed rows, and a node's own ancestors."""
        if self.tree is not None:
            return F.pad(self.tree.seen, (self.rows[0][0], 0), value=True)[None]
        return self._ragged[2]

    @cached_property
    def _ragged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Offsets, columns and visible of several slots."""
        count, nodes = len(self.rows), max(new for *_, new in self.rows)
        offsets = torch.zeros(count, nodes, dtype=torch.long)
        columns = torch.arange(self.width).repeat(count, 1)
        visible = torch.zeros(count, nodes, self.width, dtype=torch.bool)
        for i, (base, shape, new) in enumerate(self.rows):
            total, first = base + len(shape), len(shape) - new
            depths = torch.tensor(shape.depths) + base
            offsets[i, :new] = depths[first:]
            columns[i, base:total] = depths
            visible[i, :new, :base] = True
            visible[i, :new, base:total] = shape.ancestors[first:]
        return offsets.to(self.device), columns.to(self.device), visible.to(self.device)

    def memo(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """`build()` once per tree_mask: mixers keep their masks here."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]

    def ancestry(self) -> torch.Tensor:
        """[R, C, C]: true where the second buffer row is the first or lies before it on its path."""
        found: torch.Tensor = self.memo("ancestry", self._ancestry)
        return found

    def _ancestry(self) -> torch.Tensor:
        seen = torch.zeros(len(self.rows), self.width, self.width, dtype=torch.bool)
        for i, (base, shape, _) in enumerate(self.rows):
            total = base + len(shape)
            seen[i, :total, :base] = torch.ones(total, base, dtype=torch.bool).tril()
            seen[i, base:total, base:total] = shape.ancestors
        return seen.to(self.device)


class OverwriteMask(TreeMask):
    """Which held positions the tokens of one slot attend to that replace entries at `positions`.

    causal: no token sees a later position; else each sees all that are held, or with `blocks` those up to the
    end of its own block of so many positions.
    """

    def __init__(
        self,
        positions: Sequence[int],
        held: int,
        *,
        causal: bool,
        blocks: int | None,
        device: torch.device,
    ) -> None:
        self.rows, self.device, self.tree = [], device, None
        self.width, self.deepest, self.plain = held, max(positions), False
        self.committed = held
        self._memo = {}
        # no token of a block sees beyond its end: causal ones are blocks of one position
        self._positions, self._blocks = positions, 1 if causal else blocks

    @cached_property
    def _ragged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        offsets = torch.tensor([list(self._positions)], device=self.device)
        columns = torch.arange(self.width, device=self.device)[None]
        length = self.width if self._blocks is None else self._blocks
        return offsets, columns, columns[:, None] // length <= offsets[:, :, None] // length
