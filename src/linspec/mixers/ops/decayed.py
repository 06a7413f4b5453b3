"""The decayed part of a mixer: a state that fades.

    S_t = diag(a_t) S_{t-1} + k_t w_tᵀ,    o_t = q_t S_t

where a_t in (0, 1) is one factor per head or per channel, and w_t is what a token writes. Entries keep the
logarithms of a_t beside their key. With A_t the sum of those logarithms on the path from the base position
to t, token s reaches t with exp(A_t - A_s), never above 1, so that strong decay underflows to 0 and nothing
overflows. The full form does the same chunk by chunk, from the state before each chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linspec.decoding.tree_mask import TreeMask
from linspec.mixers.ops.blocks import split
from linspec.mixers.ops.exact import Groups, Map
from linspec.mixers.ops.products import decayed_products

# what tokens write, as w - r S, S being the state before them; see `delta_writes`
Writes = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor | None],
]


def plain_writes(
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    rates: torch.Tensor,
    before: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every token writes its value."""
    return v, None


@dataclass(frozen=True, slots=True)
class Chunks:
    """A sequence in n chunks of c tokens: features of keys [B, Hkv, n, c, K], what tokens write
    [B, Hkv, n, c, V], A from the start of each chunk [B, Hkv, n, c, K or 1], and the state before each
    chunk and after the last [B, Hkv, n + 1, K, V]."""

    keys: torch.Tensor
    written: torch.Tensor
    decay: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True)
class Decayed:
    """Maps of queries and of keys with their gates, and how tokens write.

    width: columns of an entry's key ahead of its gates, of which the first decay_width are log a and the
    others go to `writes`; all gates are 0 in padding. chunk: tokens that the full form takes at once.
    through_state: whether every token is read through the state; else only those before the span are.
    """

    groups: Groups
    queries: Map
    keys: Map
    width: int
    decay_width: int
    chunk: int
    through_state: bool
    writes: Writes = plain_writes

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The state after entries of keys [Hkv, C, K + E] and values [Hkv, C, V] have closed."""
        return self._chunks(keys[None], values[None], sums[None], self.chunk).states[0, :, -1]

    def summary(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The state after a shard of entries as M and A, side by side: A S + M, S being the state before it.

        A is what is left of each channel [B, Hkv, K, 1], or, where tokens correct the state, a matrix.
        """
        start = v.new_zeros(*v.shape[:2], self.width, v.shape[-1])
        if self.writes is not plain_writes:
            # who writes nothing still corrects: the state A comes of the identity and values of zero
            same = torch.eye(self.width, dtype=v.dtype, device=v.device)
            start = torch.cat((start, same.expand(*v.shape[:2], -1, -1)), dim=-1)
            return self._chunks(k, F.pad(v, (0, self.width)), start, self.chunk).states[:, :, -1]
        chunks = self._chunks(k, v, start, self.chunk)
        left = chunks.decay[..., -1, :].sum(2).exp()[..., None].expand(-1, -1, self.width, -1)
        return torch.cat((chunks.states[:, :, -1], left), dim=-1)

    def joined(self, sums: torch.Tensor | None, summary: torch.Tensor, tokens: int) -> torch.Tensor:
        """The state after a shard, from that before it."""
        columns = 1 if self.writes is plain_writes else self.width
        added, left = summary.split((summary.shape[-1] - columns, columns), dim=-1)
        if sums is None:
            return added
        return added + (left * sums if self.writes is plain_writes else left @ sums)

    def nodes(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        closed: torch.Tensor | None,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        """What the nodes of a step read from the state and from entries that count as part of it."""
        wide, path = sums.dtype, tree_mask.ancestry()[:, None]
        features, gates = self.keys(keys).to(wide), keys[..., self.width :].to(wide)
        at = tree_mask.visible[:, None].to(wide) @ gates[..., : self.decay_width]  # A of the nodes
        nodes = self.queries(q).to(wide)
        o = (nodes * at.exp()[:, :, None]).flatten(2, 3) @ sums
        seen = closed[:, 0] if closed is not None else None
        if self.through_state:
            seen = tree_mask.visible[:, None]
        if seen is not None:
            decay = path.to(wide) @ gates[..., : self.decay_width]
            before = path & ~torch.eye(path.shape[-1], dtype=torch.bool, device=path.device)
            rates = gates[..., self.decay_width :]
            written, read = self.writes(features, values.to(wide), decay, rates, before)
            if read is not None:
                written = written - read @ sums
            o = o + decayed_products(nodes, features, at, decay, seen).flatten(2, 3) @ written
        return o.to(values.dtype)

    def blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> torch.Tensor:
        """What each block, a chunk or a group, reads through the state: [B, Hkv, n, rep * c, V].

        q [B, Hkv, rep, T, K]; start [B, Hkv, K, V] is the state before the sequence.
        """
        if start is None:
            start = v.new_zeros(*v.shape[:2], self.width, v.shape[-1])
        if self.through_state:
            return self._through_state(q, self._chunks(k, v, start, self.chunk)).to(v.dtype)
        return self._before_span(q, self._chunks(k, v, start, self.groups.size)).to(v.dtype)

    def _chunks(self, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, size: int) -> Chunks:
        """Keys with gates k [B, Hkv, T, K + E] and values v in chunks, on from the state `start`."""
        wide = torch.promote_types(torch.promote_types(v.dtype, start.dtype), torch.float32)
        keys, values = split(self.keys(k).to(wide), size), split(v.to(wide), size)
        gates = split(k[..., self.width :].to(wide), size)
        decay, rates = gates[..., : self.decay_width].cumsum(-2), gates[..., self.decay_width :]
        before = torch.ones(size, size, dtype=torch.bool, device=k.device).tril(-1)
        written, read = self.writes(keys, values, decay, rates, before)
        end = decay[..., -1:, :]
        # what is left of each token, and of the state, at the end of the chunk
        late, left = (keys * (end - decay).exp()).mT, end.exp().mT
        states, added = [start.to(wide)], []
        for i in range(keys.shape[2]):
            new = written[:, :, i]
            if read is not None:
                new = new - read[:, :, i] @ states[-1]
            states.append(left[:, :, i] * states[-1] + late[:, :, i] @ new)
            added.append(new)
        return Chunks(keys, torch.stack(added, 2), decay, torch.stack(states, 2))

    def _in_chunks(self, heads: torch.Tensor, like: Chunks) -> torch.Tensor:
        """Features of queries [B, Hkv, rep, T, K] -> [B, Hkv, n, rep, c, K]."""
        features = self.queries(heads).to(like.keys.dtype)
        return split(features, like.keys.shape[3]).transpose(2, 3)

    def _through_state(self, heads: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Every token's reading of the state and of the tokens before it in its chunk."""
        q, decay = self._in_chunks(heads, chunks), chunks.decay
        seen = torch.ones(*[decay.shape[3]] * 2, dtype=torch.bool, device=q.device).tril()
        weights = decayed_products(q, chunks.keys, decay, decay, seen)
        before = (q * decay.exp()[:, :, :, None]).flatten(3, 4) @ chunks.states[:, :, :-1]
        return before + weights.flatten(3, 4) @ chunks.written

    def _before_span(self, heads: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Every token's reading of the state at the start of its span; chunks are groups."""
        q, count, ahead = self._in_chunks(heads, chunks), chunks.keys.shape[2], self.groups.span - 1
        totals, decay = chunks.decay[..., -1:, :], chunks.decay
        for back in range(1, ahead + 1):
            decay = decay + F.pad(totals, (0, 0, 0, 0, back, 0))[:, :, :count]
        first = (torch.arange(count, device=q.device) - ahead).clamp_min(0)
        states = chunks.states.index_select(2, first)
        return (q * decay.exp()[:, :, :, None]).flatten(3, 4) @ states


def decayed_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    seen: Callable[[int], range],
) -> torch.Tensor:
    """The equations, one token after the other: q, k [T, K], v [T, V], factors a [T, K] -> [T, V].

    seen(t): the tokens that t reads; all up to it fade the state.
    """
    out = []
    for t in range(len(q)):
        state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype, device=v.device)
        for s in range(t + 1):
            state = decay[s][:, None] * state
            if s in seen(t):
                state = state + torch.outer(k[s], v[s])
        out.append(q[t] @ state)
    return torch.stack(out)
