"""A block drafter in one call of the C library: new context, the block, the walk, the confidences.

call = BlockCall(plan, parts)
call.place(buffers)                       # whenever these have moved
drafts, sure = call.draft(inputs, newest)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_uint64, c_void_p, pointer
from dataclasses import dataclass
from typing import Any

import torch

from linspec.kernels.cpu.fusion import (
    FusionPlan,
    Piece,
    fusion_struct,
    line_table,
    readable,
    state_lines,
)
from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.linear import linear_struct
from linspec.kernels.cpu.step import CpuStep
from linspec.kernels.cpu.structs import (
    BatchStruct,
    BlockDrafterStruct,
    BlockRoundStruct,
    InputStruct,
)
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.step_plan import LinearPlan, StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlan:
    """What a block drafter has beside its layers, all float32; see `drafters/block_net.py`.

    fusion: makes rows of context. masks [B, D]. markov: rank -> outputs of the head. before [outputs, rank]:
    what it reads of a drafted token. sure [D + rank + 1], the bias last.
    """

    fusion: FusionPlan
    masks: torch.Tensor
    markov: LinearPlan
    before: torch.Tensor
    sure: torch.Tensor


@dataclass(frozen=True, slots=True)
class BlockInput:
    """One block. count: rows that its slot has. fresh: states of more before its root, piece by piece.

    position: of the root. root [D], before [rank]: what the block and the walk begin with.
    """

    slot: int
    count: int
    position: int
    fresh: Sequence[Piece]
    root: torch.Tensor
    before: torch.Tensor

    @property
    def more(self) -> int:
        """Rows that its slot gets."""
        return sum(len(piece[0]) for piece in self.fresh)


class BlockCall(CpuStep):
    """A block drafter as the table that the C side reads. Needs the compiled library."""

    def __init__(self, plan: StepPlan, parts: BlockPlan) -> None:
        super().__init__(plan)
        library = load().library
        assert library is not None
        self._draft, self._draft_space = _functions(library)
        # the table has addresses only
        self._parts_kept = parts
        self._drafter = BlockDrafterStruct(
            decoder=pointer(self.decoder),
            places=len(parts.masks),
            rank=parts.before.shape[1],
            fusion=pointer(fusion_struct(parts.fusion)),
            masks=parts.masks.data_ptr(),
            markov=pointer(linear_struct(parts.markov)),
            before=parts.before.data_ptr(),
            sure=parts.sure.data_ptr(),
        )

    def draft(
        self, inputs: Sequence[BlockInput], newest: torch.Tensor
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Outputs of the head and logits of the confidences, [S][B] each.

        newest [slots, D] float32: the last rows of context, which are written where there are more. Keys and
        values are written behind those of each slot, where there must be room for them and a block.
        """
        places = len(self._parts_kept.masks)
        pieces = [readable(each.fresh) for each in inputs]
        lines = [line for each in pieces for line in state_lines(each)]
        context = self._context(inputs)
        blocks, kept = self._blocks(inputs, places)
        roots = torch.stack([each.root for each in inputs]).float()
        before = torch.stack([each.before for each in inputs]).float()
        drafts = (c_int32 * (len(inputs) * places))()
        sure = (c_float * (len(inputs) * places))()
        asked = BlockRoundStruct(
            context=pointer(context),
            blocks=pointer(blocks),
            states=line_table(lines),
            roots=roots.data_ptr(),
            before=before.data_ptr(),
            newest=newest.data_ptr(),
            drafts=drafts,
            sure=ctypes.addressof(sure),
        )
        threads = native_threads()
        space = self._space.at_least(self._draft_space(self._drafter, asked, threads))
        self._draft(byref(self._drafter), byref(asked), space, threads)
        del kept
        cut = [slice(i * places, (i + 1) * places) for i in range(len(inputs))]
        return [drafts[part] for part in cut], [sure[part] for part in cut]

    def _context(self, inputs: Sequence[BlockInput]) -> BatchStruct:
        """The new rows of context as nodes of a step."""
        table = (InputStruct * len(inputs))()
        positions: list[int] = []
        for entry, each in zip(table, inputs, strict=True):
            count = each.more
            entry.slot, entry.first, entry.nodes, entry.staged = (
                each.slot,
                len(positions),
                count,
                count,
            )
            entry.committed = (c_int32 * 1)(each.count)
            positions += range(each.position - count, each.position)
        return self._nodes(positions, table)

    def _blocks(self, inputs: Sequence[BlockInput], places: int) -> tuple[BatchStruct, Any]:
        """The places of all blocks as nodes of a step, and the tensors that it writes to."""
        table = (InputStruct * len(inputs))()
        # in both directions: every node sees all of its block
        ancestors = (c_uint64 * places)(*[(1 << places) - 1] * places)
        positions: list[int] = []
        for entry, each in zip(table, inputs, strict=True):
            entry.slot, entry.first, entry.nodes, entry.staged = (
                each.slot,
                len(positions),
                places,
                places,
            )
            entry.committed = (c_int32 * 1)(each.count + each.more)
            entry.ancestors = ancestors
            positions += range(each.position, each.position + places)
        batch = self._nodes(positions, table)
        rows = len(positions)
        hidden = torch.empty(rows, self.plan.width)
        logits = torch.empty(rows, self.plan.vocabulary)
        batch.outputs, batch.output_rows = rows, (c_int32 * rows)(*range(rows))
        batch.hidden, batch.logits = hidden.data_ptr(), logits.data_ptr()
        return batch, (hidden, logits)

    def _nodes(self, positions: list[int], table: ctypes.Array[InputStruct]) -> BatchStruct:
        """Nodes that have no tokens: the C side fills in what they start from."""
        batch = self._batch((), [0] * len(positions), positions or [0], table)
        batch.rows = len(positions)
        return batch


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    library.ls_block_draft_workspace.restype = c_int64
    library.ls_block_draft_workspace.argtypes = [
        POINTER(BlockDrafterStruct),
        POINTER(BlockRoundStruct),
        c_int32,
    ]
    library.ls_block_draft.restype = None
    library.ls_block_draft.argtypes = [
        POINTER(BlockDrafterStruct),
        POINTER(BlockRoundStruct),
        c_void_p,
        c_int32,
    ]
    return library.ls_block_draft, library.ls_block_draft_workspace
