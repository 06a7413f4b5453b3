"""The state of mixers that keep a shadow of what is past: keys of low rank, landmarks, outliers, and values.

Entries lie in a buffer until their segment leaves the span. Then the mixer says what becomes of it, and it
joins the `Past` of its slot and layer, which never changes: snapshots and forks share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from linspec.errors import StateError
from linspec.kernels.step_plan import PastList
from linspec.state.contract import StateOptions
from linspec.state.entries import FLOATS, EntryFormat
from linspec.state.grouped import Fold, GroupedSpec, GroupedState
from linspec.state.offload import OffloadFile, Region
from linspec.state.past_table import PastTable
from linspec.state.registry import entry_format
from linspec.state.slots import StateSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowSpec(GroupedSpec):
    """group: positions of a segment. rank: of its keys. chunk: positions that have a landmark together.
    outliers: chunks of a segment that each KV head keeps as they are. head_width: of a key without what its
    entry has beside it."""

    rank: int
    chunk: int
    outliers: int
    head_width: int

    @property
    def chunks(self) -> int:
        """Chunks of a segment."""
        return self.group // self.chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """What a segment of S positions in C chunks becomes.

    left [S, r] and right [Hkv, r, K]: the keys ahead of their rotation are about their product. landmarks
    [Hkv, C, K]. outliers [Hkv, X]: numbers of chunks in the segment. outlier_keys, outlier_values [Hkv, X,
    c, .]. values [Hkv, C, c, V].
    """

    left: torch.Tensor
    right: torch.Tensor
    landmarks: torch.Tensor
    outliers: torch.Tensor
    outlier_keys: torch.Tensor
    outlier_values: torch.Tensor
    values: torch.Tensor


# the axis of each along which segments follow each other
_ALONG = {
    "left": 0,
    "right": 0,
    "landmarks": 1,
    "outliers": 1,
    "outlier_keys": 1,
    "outlier_values": 1,
    "values": 0,
}


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """The closed segments of one sequence in one layer, one behind the other.

    kept: as in `Closed`, in the format of the state and contiguous, right and values [segments, Hkv, ..];
    without values where these are in the `regions` of a file.
    """

    spec: ShadowSpec
    entries: EntryFormat = FLOATS
    file: OffloadFile | None = None
    segments: int = 0
    kept: dict[str, torch.Tensor] | None = None
    regions: tuple[Region, ...] = ()

    @property
    def chunks(self) -> int:
        """Chunks of all segments."""
        return self.segments * self.spec.chunks

    def of(self, name: str, width: int, dtype: torch.dtype, at: Any = slice(None)) -> torch.Tensor:
        """What is kept under this name `at` these places, as features [..., width]."""
        assert self.kept is not None, "there are segments"
        return self.entries.decode(self.kept[name][at], width, dtype)

    @property
    def outliers(self) -> torch.Tensor:
        """The chunks that are kept as they are, among those of all segments: [Hkv, X]."""
        assert self.kept is not None, "there are segments"
        return self.kept["outliers"].long()

    def closed(self, new: Closed) -> Self:
        """This and a further segment; raises StateError where a file has no room for its values."""
        made: dict[str, torch.Tensor] = {}
        regions = self.regions
        for name, axis in _ALONG.items():
            if name == "outliers":
                piece = (new.outliers + self.chunks).int()
            else:
                piece = self.entries.encode(getattr(new, name))
            if name in ("right", "values"):
                piece = piece[None]
            if name == "values" and self.file is not None:
                rows = piece.contiguous().view(torch.uint8)
                regions = (*regions, self.file.put(rows))
                continue
            # a copy, also of the first: values are a view of a buffer that is used again
            before = () if self.kept is None else (self.kept[name],)
            made[name] = torch.cat((*before, piece), axis).contiguous()
        return replace(self, segments=self.segments + 1, kept=made, regions=regions)

    def fetch(self, chunks: torch.Tensor, dtype: torch.dtype) -> Fetched:
        """Begin to read the values of `chunks` [Hkv, M], which are there when they are asked for."""
        each, heads = self.spec.chunks, torch.arange(len(chunks), device=chunks.device)[:, None]
        if self.file is None:
            at = (chunks // each, heads, chunks % each)
            return Fetched(self, dtype, self.of("values", self.spec.value_width, dtype, at))
        rows = chunks // each * (each * len(chunks)) + heads * each + chunks % each
        return Fetched(self, dtype, self.file.read_ahead(self.regions, rows))


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """Values [Hkv, M, c, V], or bytes of a file that become them."""

    past: Past
    dtype: torch.dtype
    found: torch.Tensor | Future[torch.Tensor]

    def values(self) -> torch.Tensor:
        """Values [Hkv, M, c, V]; raises StateError where the file lost them."""
        if isinstance(self.found, torch.Tensor):
            return self.found
        spec, entries = self.past.spec, self.past.entries
        read = self.found.result().unflatten(-1, (spec.chunk, -1))
        return entries.decode(
            read.view(entries.kept_dtype(self.dtype)), spec.value_width, self.dtype
        )


@dataclass(frozen=True, slots=True)
class ShadowSnapshot(StateSnapshot):
    """past: of each layer, which whoever has the snapshot shares."""

    past: tuple[Past, ...] = ()


class ShadowState(GroupedState):
    """Segments that leave the span are folded, whole, into what is past.

    folds[i]: makes of a past, keys [Hkv, S, K'] and values [Hkv, S, V] the past with this segment. With
    `options.offload`, a directory, values of closed segments are in a file there.
    """

    spec: ShadowSpec

    def __init__(
        self, spec: ShadowSpec, folds: Sequence[Fold], slots: int, options: StateOptions
    ) -> None:
        super().__init__(spec, folds, slots, options, entry_format(options))
        kept = self.entries.width(spec.value_width)
        row = spec.chunk * kept * self.entries.kept_dtype(self.dtype).itemsize
        self.file = None
        if options.offload is not None:
            self.file = OffloadFile(options.offload, spec.kv_heads * spec.chunks * row, row)
        self._nothing = Past(spec, self.entries, self.file)
        # [layers][slots], and what it becomes once one further segment has closed, two, ...
        self.past = [[self._nothing] * slots for _ in range(self.layers)]
        self._ahead: list[list[list[Past]]] = [
            [[] for _ in range(slots)] for _ in range(self.layers)
        ]
        self._table = PastTable(self.layers, slots)

    def _let_go(self, slot: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._put(layer, slot, self._closed(slot, layer, keys, values))

    def _closed(self, slot: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Past:
        """What is past once the segments of these entries have closed too, which are the first of `slot`."""
        known, size = self._ahead[layer][slot], self.spec.group
        for first in range(len(known) * size, keys.shape[1], size):
            rows = slice(first, first + size)
            before = known[-1] if known else self.past[layer][slot]
            known.append(self.folds[layer](before, *self._decoded(keys[:, rows], values[:, rows])))
        return known[keys.shape[1] // size - 1]

    def _put(self, layer: int, slot: int, past: Past) -> None:
        self.past[layer][slot], self._ahead[layer][slot] = past, []
        self._table.put(layer, slot, past)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        before = [layer[slot] for layer in self.past]
        try:
            super().commit(slot, path)
        except StateError:
            # some layers have closed the segment and others have not
            self._set(slot, before)
            raise

    def drop(self, slot: int) -> None:
        if self.staged_aside(slot):
            self._forget_ahead(slot)
        super().drop(slot)

    def _forget_ahead(self, slot: int) -> None:
        self._set(slot, [layer[slot] for layer in self.past])

    def read_sums(self, layer: int, slots: slice) -> Any:
        """What is past of these slots: a `Past` of each."""
        return tuple(self.past[layer][slots])

    # ---- for kernels

    def room_aside(self, slot: int, new: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self._forget_ahead(slot)
        return super().room_aside(slot, new)

    def past_list(self, layer: int, slot: int = 0) -> PastList:
        """Where kernels find what is past of the slots from `slot` on."""
        kept = self.entries.kept_dtype(self.dtype).itemsize
        return PastList(
            self._table.seen_from(layer, slot), self.entries.width(self.spec.rank) * kept
        )

    def last_of_segments(self, slot: int, position: int) -> int:
        """The last position that has the segments closed that `position` has closed."""
        size = self.spec.group
        segment = max(position // size, self.base_positions[slot] // size + self.spec.span - 1)
        return (segment + 1) * size - 1

    def make_ready(self, slot: int, last: int) -> None:
        """Ahead of a step of kernels up to position `last`: what it reads of what is past is there.

        Entries of segments that close on the way are committed, or staged aside. Raises StateError where a
        file has no room for their values, or no longer has those of others.
        """
        if self.file is not None:
            self.file.check()
        spec, history = self.spec, self.spec.conv_history
        gone = (last // spec.group + 1 - spec.span) * spec.group - self.base_positions[slot]
        if gone <= 0:
            return
        for layer in range(self.layers):
            keys, values = self.keys[layer, slot], self.values[layer, slot]
            if self.staged_aside(slot):
                keys, values = self.long[slot][layer]
            closing = keys[:, :gone], values[:, history : history + gone]
            self._table.put(layer, slot, self._closed(slot, layer, *closing), ahead=True)

    # ---- slots

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self._set(slot, [self._nothing] * self.layers)

    def snapshot(self, slot: int) -> ShadowSnapshot:
        copy = super().snapshot(slot)
        return ShadowSnapshot(
            spec=copy.spec,
            entries=copy.entries,
            length=copy.length,
            base_position=copy.base_position,
            keys=copy.keys,
            values=copy.values,
            past=tuple(layer[slot] for layer in self.past),
        )

    def check(self, copy: Any) -> None:
        super().check(copy)
        if not isinstance(copy, ShadowSnapshot) or any(
            each.file is not self.file for each in copy.past
        ):
            raise StateError(
                "a snapshot of what is past shares its segments with the state that it is from, and this is "
                "another; restore it there"
            )

    def restore(self, slot: int, copy: Any) -> None:
        super().restore(slot, copy)
        self._set(slot, copy.past)

    def _set(self, slot: int, past: Sequence[Past]) -> None:
        for layer, each in enumerate(past):
            self._put(layer, slot, each)

    # ---- sizes

    def segment_bytes(self) -> int:
        """Bytes of memory of a closed segment in all layers."""
        spec, width = self.spec, self.entries.width
        rows = spec.group * width(spec.rank)
        rows += spec.kv_heads * (spec.rank + spec.chunks) * width(spec.head_width)
        both = width(spec.head_width) + width(spec.value_width)
        rows += spec.kv_heads * spec.outliers * spec.chunk * both
        if self.file is None:
            rows += spec.kv_heads * spec.group * width(spec.value_width)
        size = self.entries.kept_dtype(self.dtype).itemsize
        # and the number of each outlier
        return self.layers * (rows * size + spec.kv_heads * spec.outliers * 4)

    def _segments(self, length: int) -> int:
        return max(0, length // self.spec.group + 1 - self.spec.span)

    def bytes_at(self, length: int) -> int:
        return super().bytes_at(length) + self._segments(length) * self.segment_bytes()

    def missing_bytes(self, length: int) -> int:
        return self._segments(length) * self.segment_bytes()
