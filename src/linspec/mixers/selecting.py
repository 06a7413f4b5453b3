"""Softmax attention over the last groups, and over what a query selects of the groups before them.

A mixer of this kind says what is selected, in `select`, and nothing else. What a token selects depends on its
own query and on the tokens before it: not on how the tokens came, as a prompt, one by one or in a tree. So
the forms of the mixer agree, and speculation is lossless for the model that selects.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.exact import Groups
from linspec.mixers.softmax import Softmax


class Selecting(Softmax):
    """Base of sparse softmax attention: nothing is forgotten, and few rows are read.

    With group size G and a span of n groups, a token in group g sees exactly the groups g - n + 1 .. g,
    and of the groups before them what `select` says. Keys and values of all tokens are kept in a cache.
    """

    keeps_cache = True
    biased: ClassVar[bool] = False
    stands_in = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if config.relative is not None:
            raise ConfigError(
                f"mixer {mixer.name!r} has no relative position bias; choose another for this model "
                "(linspec list)"
            )
        super().__init__(config, mixer)
        self.groups = Groups(mixer.group, mixer.span)
        self.ends_alone = not mixer.taps

    def select(self, q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Which rows queries select: q [R, Hkv, rep, N, K], keys [R, Hkv, M, K] -> [R, Hkv, rep or 1, N, M].

        Row m is that of position m. Of query n only the rows before `ends` [R, N], a multiple of the group
        size, may be selected; what is said of others is not heard.
        """
        raise NotImplementedError

    # ---- step form

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        near, far = self.groups.masks(tree_mask)
        if far is not None:
            chosen = far & self._selected(q, keys, tree_mask, far)
            near = chosen if near is None else near | chosen
        return self.exact.nodes(q, keys, values, near).unflatten(2, q.shape[2:4])

    def _selected(
        self, q: torch.Tensor, keys: torch.Tensor, tree_mask: TreeMask, far: torch.Tensor
    ) -> torch.Tensor:
        """`select` for the nodes of a step, over the columns of their slots: [R, Hkv, rep or 1, N, C]."""
        ends = self.groups.ends(tree_mask.offsets)
        width = int(ends.max())
        if width <= tree_mask.committed:
            found = self.select(q, keys[:, :, :width], ends)
            return F.pad(found, (0, keys.shape[2] - width))
        # groups that close in the tree itself: the path of every node has its own rows
        return torch.cat(
            [
                self._selected_on_paths(q[r : r + 1], keys[r : r + 1], far[r, 0, 0])
                for r in range(far.shape[0])
            ]
        )

    def _selected_on_paths(
        self, q: torch.Tensor, keys: torch.Tensor, far: torch.Tensor
    ) -> torch.Tensor:
        """`select` for the nodes of one slot, whose rows beyond the span are the columns in `far` [N, C]."""
        chosen = torch.zeros(*q.shape[:4], keys.shape[2], dtype=torch.bool, device=q.device)
        for node, columns in enumerate(far):
            # ancestors stand in front of a node: in the order of their positions
            path = columns.nonzero()[:, 0]
            if len(path):
                ends = path.new_full((1, 1), len(path))
                found = self.select(q[:, :, :, node : node + 1], keys[:, :, path], ends)
                chosen[:, :, :, node : node + 1, path] = found.expand(-1, -1, q.shape[2], -1, -1)
        return chosen

    # ---- full form

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.mix_end(q, k, v)

    def over(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        assert mask is not None, "queries come with what they may see"
        count, time = mask.shape
        positions = torch.arange(time - count, time, device=q.device)
        ends, nodes = self.groups.ends(positions), q.unflatten(1, (self.kv_heads, self.repeats))
        width = int(ends[-1])
        far = torch.arange(time, device=q.device) < ends[:, None]
        seen = (mask & ~far).expand(len(q), 1, 1, -1, -1)
        if width:
            found = self._found(nodes, k[:, :, :width], ends.expand(len(q), -1), time)
            found = F.pad(found, (0, time - width))
            seen = seen | (far & found)
        seen = seen.expand(-1, self.kv_heads, self.repeats, -1, -1).flatten(1, 2)
        return super().over(q, k, v, seen)

    def _found(
        self, q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor, time: int
    ) -> torch.Tensor:
        """`select` for the last of `time` tokens."""
        return self.select(q, keys, ends)
