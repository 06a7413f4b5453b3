"""The tree mask of a step of static shape: all that changes between steps is in tensors.

`StepTables` are those tensors, one row for each of R slots, with room for N new nodes: a step writes into
them and runs a program that was made once. A slot with fewer nodes has its last one again, and a step of
fewer slots its last slot: what is computed twice is written twice to the same place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from typing import ClassVar

import torch

from linspec.decoding.judged import BY_ARGMAX, JudgeBy
from linspec.decoding.tree import Shape
from linspec.decoding.tree_mask import TreeMask

# staged nodes of a slot: bits of one number
_STAGED = 64


@dataclass(frozen=True, slots=True)
class SlotNodes:
    """The new nodes of one slot. shape: of all that it has staged then, the new nodes last. held: committed
    rows in each kind of state, and bases: the position of the first of them. judge: how they are judged, None
    where they are not."""

    slot: int
    tokens: Sequence[int]
    positions: Sequence[int]
    shape: Shape
    held: Sequence[int]
    bases: Sequence[int]
    judge: JudgeBy | None = None


class StepTables:
    """tokens, positions, nodes [R, N]: nodes are numbered among the staged ones of their slot. slots [R].
    held, bases [P, R] of P kinds of state. depths, ancestors [R, 64] of all staged nodes: bit i says that
    node i is the node itself or lies before it on its path.

    Of slots whose new nodes the step judges as a tree, tree_depths and tree_ancestors [R, N] are those within
    this tree; there are no bits for nodes that a slot has not, nor for any of a slot that is not judged.
    temperatures [R], numbers [R, 64] by depth among all staged nodes (both float64), regrow [R, N]: see
    `JudgeBy`."""

    def __init__(self, slots: int, nodes: int, kinds: int, device: torch.device) -> None:
        self.rows, self.columns = slots, nodes
        sizes = {
            "tokens": (slots, nodes),
            "positions": (slots, nodes),
            "nodes": (slots, nodes),
            "slots": (slots,),
            "held": (kinds, slots),
            "bases": (kinds, slots),
            "depths": (slots, _STAGED),
            "ancestors": (slots, _STAGED),
            "temperatures": (slots,),
            "numbers": (slots, _STAGED),
            "tree_depths": (slots, nodes),
            "tree_ancestors": (slots, nodes),
            "regrow": (slots, nodes),
        }
        counts = [torch.Size(size).numel() for size in sizes.values()]
        # one buffer, because every copy to a device costs the same however small it is
        self._all = torch.zeros(sum(counts), dtype=torch.long, device=device)
        pieces = zip(sizes.items(), self._all.split(counts), strict=True)
        found = self._found = {name: piece.view(size) for (name, size), piece in pieces}
        self.tokens, self.positions, self.nodes = (
            found[name] for name in ("tokens", "positions", "nodes")
        )
        self.slots, self.held, self.bases = (found[name] for name in ("slots", "held", "bases"))
        self.depths, self.ancestors = found["depths"], found["ancestors"]
        # the bits of float64 lie where whole numbers do
        self.temperatures = found["temperatures"].view(torch.float64)
        self.numbers = found["numbers"].view(torch.float64)
        self.tree_depths, self.tree_ancestors = found["tree_depths"], found["tree_ancestors"]
        self.regrow = found["regrow"]

    def fill(self, slots: Sequence[SlotNodes]) -> None:
        """Write the nodes of a step, of as many slots and nodes as there is room for, or fewer."""
        wide = [*slots, *repeat(slots[-1], self.rows - len(slots))]
        by_slot = (
            [self._padded(each.tokens) for each in wide],
            [self._padded(each.positions) for each in wide],
            [self._padded(_new_nodes(each)) for each in wide],
            [[each.slot] for each in wide],
            zip(*(each.held for each in wide), strict=True),
            zip(*(each.bases for each in wide), strict=True),
            [_filled(each.shape.depths, _STAGED) for each in wide],
            [_filled(map(_signed, each.shape.ancestor_bits), _STAGED) for each in wide],
            [_bits([_judge_of(each).temperature]) for each in wide],
            [_filled(_bits(_judge_of(each).numbers(_STAGED)), _STAGED) for each in wide],
            [self._of_tree(each, each.shape.depths) for each in wide],
            [self._of_tree(each, map(_signed, each.shape.ancestor_bits)) for each in wide],
            [self._padded(_judge_of(each).regrow or (0,)) for each in wide],
        )
        numbers = list(chain.from_iterable(chain.from_iterable(by_slot)))
        self._all.copy_(torch.tensor(numbers))

    def changed(self, **tables: torch.Tensor) -> torch.Tensor:
        """All numbers with other ones for these tables: what `put` takes."""
        pieces = self._found | tables
        return torch.cat([pieces[name].flatten() for name in self._found])

    def put(self, numbers: torch.Tensor) -> None:
        """Take over what `changed` made, on the device."""
        self._all.copy_(numbers)

    def _padded(self, numbers: Sequence[int]) -> list[int]:
        return [*numbers, *repeat(numbers[-1], self.columns - len(numbers))]

    def _of_tree(self, each: SlotNodes, numbers: Iterable[int]) -> list[int]:
        """Of the nodes of a tree that is judged, which is all that its slot has staged."""
        return _filled([] if each.judge is None else numbers, self.columns)


def _new_nodes(each: SlotNodes) -> range:
    return range(len(each.shape) - len(each.tokens), len(each.shape))


def _filled(numbers: Iterable[int], count: int) -> list[int]:
    """With zeros behind them, `count` in all."""
    found = list(numbers)
    return [*found, *repeat(0, count - len(found))]


def _judge_of(each: SlotNodes) -> JudgeBy:
    return each.judge or BY_ARGMAX


def _bits(numbers: Sequence[float]) -> list[int]:
    """The whole numbers of the same bits as these of float64."""
    count = len(numbers)
    return list(struct.unpack(f"{count}q", struct.pack(f"{count}d", *numbers)))


def _signed(bits: int) -> int:
    """The signed 64-bit number of the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits


class StaticTreeMask(TreeMask):
    """A tree mask over all `width` columns of a buffer, from the tables of a step and its `held` rows [R]."""

    static: ClassVar[bool] = True

    def __init__(self, tables: StepTables, held: torch.Tensor, width: int) -> None:
        self.tables, self.held, self.width = tables, held, width
        self.device, self.tree, self.plain = held.device, None, False
        self._memo = {}

    @cached_property
    def _staged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, C]: whether a column may be a staged one, and which."""
        column = torch.arange(self.width, device=self.device) - self.held[:, None]
        inside = (column >= 0) & (column < _STAGED)
        return inside, column.clamp(0, _STAGED - 1)

    @cached_property
    def there(self) -> torch.Tensor:
        """[R, C]: columns that a row lies in; what rejected nodes left in the others may be no number."""
        staged = (self.tables.ancestors != 0).sum(1)
        return torch.arange(self.width, device=self.device) < (self.held + staged)[:, None]

    @cached_property
    def offsets(self) -> torch.Tensor:
        return self.held[:, None] + self.tables.depths.gather(1, self.tables.nodes)

    @cached_property
    def columns(self) -> torch.Tensor:
        inside, node = self._staged
        depth = self.held[:, None] + self.tables.depths.gather(1, node)
        return torch.where(inside, depth, torch.arange(self.width, device=self.device))

    @cached_property
    def visible(self) -> torch.Tensor:
        return self._seen_by(self.tables.ancestors.gather(1, self.tables.nodes))

    def _seen_by(self, ancestors: torch.Tensor) -> torch.Tensor:
        """[R, N, C]: columns that nodes with these bits [R, N] see."""
        inside, node = self._staged
        on_path = (ancestors[:, :, None] >> node[:, None]) & 1
        committed = torch.arange(self.width, device=self.device) < self.held[:, None]
        return committed[:, None] | (inside[:, None] & on_path.bool())

    def _ancestry(self) -> torch.Tensor:
        inside, node = self._staged
        at = torch.arange(self.width, device=self.device)
        committed = at < self.held[:, None]
        # of a column that is neither committed nor staged there are no ancestors: its bits are 0
        staged = self._seen_by(self.tables.ancestors.gather(1, node)) & inside[:, :, None]
        before = (at <= at[:, None]) & committed[:, :, None]
        real = self.tables.ancestors.gather(1, node) != 0
        return before | (staged & real[:, :, None])
