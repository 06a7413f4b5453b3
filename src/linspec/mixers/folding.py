"""Mixers whose nodes read, under one softmax, the last groups and what the groups before them have become."""

from __future__ import annotations

from typing import Any

import torch

from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError
from linspec.mixers.carry import Carry
from linspec.mixers.closing import ClosingMixer
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.blocks import causal_window, join, windows
from linspec.mixers.ops.summed import to_blocks


class FoldingMixer(ClosingMixer):
    """Base of softmax mixers that say what closing groups become (`closed_group`), and read it (`read`).

    What is folded, and when, depends on the tokens and their positions alone, so a prompt, its steps and a
    tree that crosses borders of groups fold the same.
    """

    stands_in = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if mixer.kernel != "own":
            raise ConfigError(
                f"mixer {mixer.name!r} has softmax weights; kernel {mixer.kernel!r} means nothing to it, "
                "leave it out"
            )
        super().__init__(config, mixer)

    def closed_group(self, sums: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """Sums of B sequences after one group of keys [B, Hkv, G, K'] and values [B, Hkv, G, V]."""
        return self.fold(sums, keys, values)

    def nothing_closed(self, k: torch.Tensor) -> Any:
        """Sums of the B sequences whose keys are k [B, Hkv, T, K'], ahead of their first group."""
        raise NotImplementedError

    def read(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        near: torch.Tensor,
        sums: Any,
    ) -> torch.Tensor:
        """Softmax over sums and entries: q [R, Hkv, rep, N, K], near [1 or R, 1, 1, N, C] -> [.., N, V]."""
        raise NotImplementedError

    def carry(self) -> Carry:
        # what closes cannot be said of a part of the past
        return Carry(span=None)

    # ---- step form

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: Any,
    ) -> torch.Tensor:
        assert sums is not None, "rows are kept in a state of this mixer's own"
        near, far = self.groups.masks(tree_mask)
        if near is None:
            near = q.new_ones(1, 1, 1, q.shape[3], keys.shape[2], dtype=torch.bool)
        if far is None:
            return self.read(q, keys, values, near, sums)
        # groups close in the tree itself: paths that close different ones fold rows of their own
        near, out = near.expand(len(q), -1, -1, -1, -1), torch.empty_like(q)
        for slot, closing in enumerate(far[:, 0, 0]):
            one = slice(slot, slot + 1)
            paths, path_of = closing.unique(dim=0, return_inverse=True)
            for number, path in enumerate(paths):
                nodes = path_of == number
                closed = (rows[one][:, :, path] for rows in (keys, values))
                kept = self._closed(sums[one], *closed)
                part = (q[one][:, :, :, nodes], keys[one], values[one], near[one][:, :, :, nodes])
                out[one, :, :, nodes] = self.read(*part, kept)
        return out

    def _closed(self, sums: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """Sums after whole groups have closed, one behind the other."""
        for start in range(0, keys.shape[-2], self.groups.size):
            closing = slice(start, start + self.groups.size)
            sums = self.closed_group(sums, keys[..., closing, :], values[..., closing, :])
        return sums

    # ---- full form

    def mix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: Any = None
    ) -> torch.Tensor:
        group, span = self.groups.size, self.groups.span
        blocks = to_blocks(q.unflatten(1, (self.kv_heads, self.repeats)), group)
        count = blocks.shape[2]
        before = self.groups.before(count)
        keys, values = windows(k, None, before, group), windows(v, None, before, group)
        seen = causal_window(count, group, before, q.device)
        if sums is None:
            sums = self.nothing_closed(k)
        out = []
        for block in range(count):
            if block >= span:
                closing = slice((block - span) * group, (block - span + 1) * group)
                sums = self.closed_group(sums, k[:, :, closing], v[:, :, closing])
            queries = blocks[:, :, block].unflatten(2, (self.repeats, group))
            entries = (keys[:, :, block], values[:, :, block], seen[block][None, None, None])
            out.append(self.read(queries, *entries, sums).flatten(2, 3))
        return join(torch.stack(out, dim=2), self.repeats, q.shape[2])
