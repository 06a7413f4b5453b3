"""Linear attention whose state fades: what gated linear attention and the delta rule share.

    S_t = diag(a_t) S_{t-1} + k_t w_tᵀ,    o_t = q_t S_t

where a_t in (0, 1) is one factor per head or per channel, and w_t is what a mixer writes. Rows keep the
logarithms of a_t beside their key. With A_t the sum of those logarithms on the path from the base_position to
t, row s reaches t with exp(A_t - A_s), never above 1, so that strong decay underflows to 0 and nothing
overflows. The full form does the same chunk by chunk, from the state before each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from linspec.decoding.tree_mask import TreeMask
from linspec.mixers.blocks import join, split
from linspec.mixers.linear import GroupedLinear
from linspec.state.grouped import GroupedSpec

# a gate x fades the state by sigmoid(x)^(1/16) per token (Yang et al. 2024, arXiv 2312.06635)
GATE_TEMPERATURE = 16.0


def log_decay(gate: torch.Tensor) -> torch.Tensor:
    """The logarithm of the factor that a gate stands for, 0 or less."""
    return F.logsigmoid(gate) / GATE_TEMPERATURE


@dataclass(frozen=True, slots=True)
class Chunks:
    """A sequence in n chunks of c rows: features of keys [B, Hkv, n, c, K], what rows write
    [B, Hkv, n, c, V], A from the start of each chunk [B, Hkv, n, c, K or 1], and the state before each
    chunk and after the last [B, Hkv, n + 1, K, V]."""

    keys: torch.Tensor
    written: torch.Tensor
    decay: torch.Tensor
    states: torch.Tensor


class Fading(GroupedLinear):
    """Base of the mixers with decay.

    With the mixer's own kernel every token is read through the fading state, and groups only batch
    its updates; with another kernel the rows within reach are read by that one alone. chunk: rows
    that the full form takes at once. decay_width: 1, or one factor per channel; gate_width: columns
    that a row keeps beside its key, the logarithms of the decay first, all of them 0 in padding.
    """

    wide = True
    chunk = 16
    decay_width: int
    gate_width: int

    def writes(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        rates: torch.Tensor,
        before: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What rows write: (w [..., C, V], r [..., C, K]) for w - r S, S being the state before them.

        k are features of keys, decay [..., C, K or 1] is A, rates are the columns of the gates behind
        it; before [..., C, C] is true where the second row is a proper ancestor of the first.
        """
        return v, None

    def state_spec(self) -> GroupedSpec:
        return replace(super().state_spec(), key_width=self.head_width + self.gate_width)

    def near_features(self, x: torch.Tensor) -> torch.Tensor:
        return super().near_features(x[..., : self.head_width])

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        return super().summed_keys(k[..., : self.head_width])

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self._chunks(keys[None], values[None], sums[None], self.chunk).states[0, :, -1]

    # ---- step form

    def _near_rows(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        return super()._near_rows(q, keys, values, seen, bias) if self.arranged else None

    def _far_rows(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        beyond: torch.Tensor | None,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        wide = sums.dtype
        features, path = self.summed_keys(keys).to(wide), tree_mask.ancestry()[:, None]
        gates = keys[..., self.head_width :].to(wide)
        at = tree_mask.visible[:, None].to(wide) @ gates[..., : self.decay_width]  # A of the nodes
        nodes = self.summed_queries(q).to(wide)
        o = (nodes * at.exp()[:, :, None]).flatten(2, 3) @ sums
        seen = beyond[:, 0] if beyond is not None else None
        if not self.arranged:
            seen = tree_mask.visible[:, None]
        if seen is not None:
            decay = path.to(wide) @ gates[..., : self.decay_width]
            before = path & ~torch.eye(path.shape[-1], dtype=torch.bool, device=path.device)
            rates = gates[..., self.decay_width :]
            written, read = self.writes(features, values.to(wide), decay, rates, before)
            if read is not None:
                written = written - read @ sums
            o = o + fading_products(nodes, features, at, decay, seen).flatten(2, 3) @ written
        return o.to(values.dtype)

    # ---- full form

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        if sums is None:
            sums = v.new_zeros(*v.shape[:2], self.head_width, self.head_width)
        near = None
        if self.arranged:
            near = self._near_blocks(self._blocks(self.near_queries(heads)), self.near_keys(k), v)
            far = self._before_reach(heads, self._chunks(k, v, sums, self.mixer.group))
        else:
            far = self._through_state(heads, self._chunks(k, v, sums, self.chunk))
        return join(self.combine(near, far.to(v.dtype)), self.repeats, q.shape[2])

    def _chunks(self, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, size: int) -> Chunks:
        """Row keys k [B, Hkv, T, K + E] and values v in chunks, on from the state `start`."""
        wide = torch.promote_types(torch.promote_types(v.dtype, start.dtype), torch.float32)
        keys, values = split(self.summed_keys(k).to(wide), size), split(v.to(wide), size)
        gates = split(k[..., self.head_width :].to(wide), size)
        decay, rates = gates[..., : self.decay_width].cumsum(-2), gates[..., self.decay_width :]
        before = torch.ones(size, size, dtype=torch.bool, device=k.device).tril(-1)
        written, read = self.writes(keys, values, decay, rates, before)
        end = decay[..., -1:, :]
        # what is left of each row, and of the state, at the end of the chunk
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
        features = self.summed_queries(heads).to(like.keys.dtype)
        return split(features, like.keys.shape[3]).transpose(2, 3)

    def _through_state(self, heads: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Every token's reading of the state and of the rows before it in its chunk."""
        q, decay = self._in_chunks(heads, chunks), chunks.decay
        seen = torch.ones(*[decay.shape[3]] * 2, dtype=torch.bool, device=q.device).tril()
        weights = fading_products(q, chunks.keys, decay, decay, seen)
        before = (q * decay.exp()[:, :, :, None]).flatten(3, 4) @ chunks.states[:, :, :-1]
        return before + weights.flatten(3, 4) @ chunks.written

    def _before_reach(self, heads: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Every token's reading of the state at the start of its reach; chunks are groups."""
        q, count, ahead = self._in_chunks(heads, chunks), chunks.keys.shape[2], self.mixer.span - 1
        totals, decay = chunks.decay[..., -1:, :], chunks.decay
        for back in range(1, ahead + 1):
            decay = decay + F.pad(totals, (0, 0, 0, 0, back, 0))[:, :, :count]
        first = (torch.arange(count, device=q.device) - ahead).clamp_min(0)
        states = chunks.states.index_select(2, first)
        return (q * decay.exp()[:, :, :, None]).flatten(3, 4) @ states


def fading_products(
    q: torch.Tensor,
    k: torch.Tensor,
    at: torch.Tensor,
    decay: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Products of q [..., rep, N, K] and k [..., C, K] that fade along the path: [..., rep, N, C].

    at [..., N, .] and decay [..., C, .] are A of the queries' and the keys' tokens, per channel or for
    all; products are 0 where `seen` [..., N, C] is false.
    """
    # differences of logarithms, masked before exp: off the path they may be large
    if decay.shape[-1] == 1:
        left = (at - decay.mT).masked_fill(~seen, float("-inf")).exp()
        products = (q.flatten(-3, -2) @ k.mT).unflatten(-2, q.shape[-3:-1])
        return products * left.unsqueeze(-3)
    gaps = at.unsqueeze(-2) - decay.unsqueeze(-3)  # [..., N, C, K]
    left = gaps.masked_fill(~seen.unsqueeze(-1), float("-inf")).exp()
    return (q.transpose(-3, -2) @ (left * k.unsqueeze(-3)).mT).transpose(-3, -2)
