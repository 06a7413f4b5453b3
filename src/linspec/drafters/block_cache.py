"""What a block drafter keeps of each sequence: keys and values of the context, for its last tokens only.

Blocks leave nothing behind: what a round drafts is dropped, and the next draft reads the target's states of
the tokens that were committed since. Where some were missed all the same, there is a gap, which costs
acceptance and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linspec.drafters.block_net import BlockConfig, BlockNet, Rows
from linspec.drafters.held import newest, positions_in
from linspec.kernels.cpu.fusion import Piece


@dataclass(frozen=True, slots=True)
class Asked:
    """A block that is asked for.

    number: of the sequence in `slot`. root, position: of its newest token. pieces: states of the layers that
    are read, at the tokens just before the root.
    """

    slot: int
    number: int
    root: int
    position: int
    pieces: Sequence[Piece]


class BlockCache:
    """Rows of context by slot: [slots, Hkv, room, K] for keys and for values of each layer.

    counts: rows of a slot. ends: the position behind its last row. newest [slots, D]: that row
    of context.
    """

    def __init__(self, config: BlockConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        # new rows, at most a window of them, go behind a window of old ones
        self.room = 3 * config.window + config.places
        shape = (0, config.kv_heads, self.room, config.head_width)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        self.keys = [empty] * config.depth
        self.values = [empty] * config.depth
        self.newest = torch.zeros(0, config.width, device=device, dtype=dtype)
        self.counts: list[int] = []
        self.ends: list[int] = []
        self._owners: list[int] = []

    def fresh(self, asked: Asked) -> list[Piece]:
        """The states that the cache lacks, for which it has made room; there may be none."""
        slot = asked.slot
        self._grow(slot + 1)
        if self._owners[slot] != asked.number or self.ends[slot] > asked.position:
            self._owners[slot], self.counts[slot], self.ends[slot] = asked.number, 0, 0
        lacking = min(asked.position - self.ends[slot], self.config.window)
        found = newest(asked.pieces, lacking)
        self._make_room(slot, positions_in(found))
        return found

    def forget(self, slot: int) -> None:
        """Another sequence begins in a slot."""
        if slot < len(self._owners):
            self._owners[slot] = -1

    def _grow(self, slots: int) -> None:
        """Room for `slots` sequences, at least twice as much as before where it is too little."""
        have = len(self.counts)
        if slots <= have:
            return
        more = max(slots, 2 * have) - have
        for tensors in (self.keys, self.values):
            tensors[:] = [torch.cat((t, t.new_zeros(more, *t.shape[1:]))) for t in tensors]
        self.newest = torch.cat((self.newest, self.newest.new_zeros(more, self.config.width)))
        self.counts += [0] * more
        self.ends += [0] * more
        self._owners += [-1] * more

    def _make_room(self, slot: int, more: int) -> None:
        """Move the last window of rows to the front where there is no room for `more` and a block."""
        count, kept = self.counts[slot], min(self.counts[slot], self.config.window)
        if count + more + self.config.places <= self.room:
            return
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, :kept] = tensor[slot, :, count - kept : count].clone()
        self.counts[slot] = kept

    def put(self, slot: int, rows: Sequence[Rows], newest: torch.Tensor, end: int) -> None:
        """Keep keys and values [n, Hkv, K] of each layer; the last row of context is `newest` [D]."""
        count, more = self.counts[slot], len(rows[0][0])
        for layer, (keys, values) in enumerate(rows):
            self.keys[layer][slot, :, count : count + more] = keys.transpose(0, 1)
            self.values[layer][slot, :, count : count + more] = values.transpose(0, 1)
        self.newest[slot] = newest
        self.enter(slot, more, end)

    def enter(self, slot: int, more: int, end: int) -> None:
        """Count `more` rows that were written behind those of a slot, the last of them before `end`."""
        self.counts[slot] += more
        self.ends[slot] = end

    def seen(self, slots: Sequence[int]) -> tuple[list[Rows], torch.Tensor]:
        """What blocks in some slots see: keys and values [S, T, Hkv, K] by layer; where any are [S, T]."""
        starts = [max(0, self.counts[slot] - self.config.window) for slot in slots]
        most = max(self.counts[slot] - start for slot, start in zip(slots, starts, strict=True))
        there = torch.zeros(len(slots), most, dtype=torch.bool, device=self.newest.device)
        found = []
        for keys, values in zip(self.keys, self.values, strict=True):
            pair = [t.new_zeros(len(slots), most, *t.shape[1::2]) for t in (keys, values)]
            for i, (slot, start) in enumerate(zip(slots, starts, strict=True)):
                count = self.counts[slot] - start
                there[i, :count] = True
                for to, tensor in zip(pair, (keys, values), strict=True):
                    to[i, :count] = tensor[slot, :, start : start + count].transpose(0, 1)
            found.append((pair[0], pair[1]))
        return found, there


@torch.inference_mode()
def draft(
    net: BlockNet, cache: BlockCache, asked: Sequence[Asked]
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and confidences [S][B] for some sequences, whose context is kept up to their roots."""
    if not asked:
        return [], []
    for each in asked:
        pieces = cache.fresh(each)
        if not pieces:
            continue
        fresh = [torch.cat(layer).to(cache.newest) for layer in zip(*pieces, strict=True)]
        context = net.context(fresh)[None]
        positions = torch.arange(each.position - len(fresh[0]), each.position)[None]
        rows = net.rows(context, positions.to(context.device))
        kept = [(keys[0], values[0]) for keys, values in rows]
        cache.put(each.slot, kept, context[0, -1], each.position)
    slots = [each.slot for each in asked]
    context_rows, seen = cache.seen(slots)
    device = cache.newest.device
    roots = net.embedded(torch.tensor([each.root for each in asked], device=device))
    positions = torch.tensor([[each.position] for each in asked], device=device)
    newest = cache.newest[slots][:, None]
    found = net.blocks(newest, roots[:, None], positions, context_rows, seen[:, None])[:, 0]
    drafts, sure = net.walk(found, net.unary(found), roots)
    tokens: list[list[int]] = net.tokens(drafts).tolist()
    shares: list[list[float]] = net.confidences(sure.float()).tolist()
    return tokens, shares
