"""StreamingLLM (Xiao et al. 2023): softmax over what is near and over the very first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.carry import Carry
from linspec.mixers.closing import ClosingMixer
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.blocks import causal_window, join, windows
from linspec.mixers.ops.exact import Exact, softmax_attention, softmax_weights
from linspec.mixers.ops.kept_rows import pack_rows, row_columns, unpack_rows
from linspec.mixers.ops.summed import to_blocks
from linspec.mixers.options import SinkOptions
from linspec.state.contract import LayerState, StateOptions
from linspec.state.registry import entry_format
from linspec.state.sinks import SinkSpec, SinkState


@MIXERS.register(
    "streaming",
    summary="softmax over the groups within reach and the first tokens of the text (sinks)",
    paper="Xiao et al. 2023 (StreamingLLM), arXiv 2309.17453",
    state="2·n·G·d + s·(2·d + 1) per KV head, s sinks",
    cost="2·(n·G + s)·d per token",
    options=SinkOptions,
)
class Streaming(ClosingMixer):
    """Softmax over s within reach of t and over s < sinks.

    Within reach are t's own group and the span - 1 groups before it. The sinks are rows of the first
    group; when that closes they move to where other mixers keep their sums, each with a 1 that says
    that it is there.
    """

    stands_in = True
    keeps_cache = True
    static_step = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if mixer.kernel != "own":
            raise ConfigError(
                f"mixer 'streaming' has softmax weights; kernel {mixer.kernel!r} means nothing to it, "
                "leave it out"
            )
        if mixer.sinks > mixer.group:
            raise ConfigError(
                f"mixer 'streaming' takes its sinks from the first group of {mixer.group} tokens, got "
                f"{mixer.sinks}; choose fewer sinks or a larger group"
            )
        super().__init__(config, mixer)
        self.exact = Exact(partial(softmax_weights, scale=config.score_scale, cap=config.score_cap))

    # ---- state

    def sum_width(self) -> int:
        return self.mixer.sinks

    def sum_columns(self) -> int:
        return row_columns(self.head_width)

    def state_spec(self) -> SinkSpec:
        return SinkSpec(**asdict(super().state_spec()))

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        entries = entry_format(options)
        return SinkState(self.state_spec(), len(layers), slots, options, entries)

    # ---- shards of a sequence

    def carry(self) -> Carry:
        return Carry(self.mixer.group, self.mixer.span, self if self.mixer.sinks else None)

    def summary(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The first rows of a shard, which are sinks if it is the first one."""
        count = self.mixer.sinks
        return pack_rows(k[:, :, :count], v[:, :, :count])

    def joined(self, sums: torch.Tensor | None, summary: torch.Tensor, tokens: int) -> torch.Tensor:
        return summary if sums is None else sums

    # ---- step form

    def attention_plan(self) -> AttentionPlan | None:
        if type(self) is not Streaming:
            return None
        group, span, sinks = self.mixer.group, self.mixer.span, self.mixer.sinks
        return AttentionPlan(group=group, span=span, sinks=sinks)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        near, first = self._masks(tree_mask)
        if sums is None:
            # of a cache that keeps all rows, the sinks where they were
            near = near | first
        else:
            k, v, there = unpack_rows(sums.to(q.dtype))
            there = there[:, 0, :1]  # [R, 1, 1]: all sinks of a slot are there, or none
            near = near | (first & ~there)
            kept = there.expand(*near.shape[:2], k.shape[2])
            near = torch.cat((kept, near), dim=-1)
            keys, values = torch.cat((k, keys), dim=2), torch.cat((v, values), dim=2)
        o = self.exact.nodes(q, keys, values, near[:, None, None])
        return o.unflatten(2, q.shape[2:4])

    def _masks(self, tree_mask: TreeMask) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows within each node's reach, and the first rows of its slot: [R, N, C] each."""
        group, span, sinks = self.mixer.group, self.mixer.span, self.mixer.sinks

        def build() -> tuple[torch.Tensor, torch.Tensor]:
            oldest = (tree_mask.offsets // group - (span - 1)) * group
            column = tree_mask.columns[:, None, :]
            near = tree_mask.visible & (column >= oldest[:, :, None])
            return near, tree_mask.visible & (column < sinks)

        found: tuple[torch.Tensor, torch.Tensor] = tree_mask.memo(
            ("streaming", group, span, sinks), build
        )
        return found

    # ---- full form

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group, sinks = self.groups.size, self.mixer.sinks
        blocks = to_blocks(q.unflatten(1, (self.kv_heads, self.repeats)), group)
        before = self.groups.before(blocks.shape[2])
        keys, values = windows(k, None, before, group), windows(v, None, before, group)
        count = keys.shape[2]
        seen = causal_window(count, group, before, q.device).repeat(1, self.repeats, 1)[None]
        if sinks:
            k, v, old = self._sinks(k, v, sums, count)
            old = old[:, :, None].expand(-1, -1, seen.shape[2], -1)
            seen = torch.cat((old, seen.expand(len(old), -1, -1, -1)), dim=-1)
            keys, values = (
                torch.cat((one[:, :, None].expand(-1, -1, count, -1, -1), rows), dim=3)
                for one, rows in ((k, keys), (v, values))
            )
        o = self._over_blocks(blocks, keys, values, seen)
        return join(o, self.repeats, q.shape[2])

    def _sinks(
        self, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor | None, count: int
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values [B, Hkv, s, .] of the sinks, and who of `count` blocks sees them: [1 or B, n, s].

        Where they are rows of the sequence itself, only blocks that do not reach them as neighbours do.
        """
        sinks = self.mixer.sinks
        # a text may be shorter than its sinks
        short = max(0, sinks - k.shape[2])
        k, v = (F.pad(rows[:, :, :sinks], (0, 0, 0, short)) for rows in (k, v))
        far = torch.arange(count, device=k.device)[None, :, None] >= self.mixer.span
        if sums is None:
            return k, v, far.expand(-1, -1, sinks)
        kept_k, kept_v, there = unpack_rows(sums.to(k.dtype))
        there = there[:, :1, :1]  # [B, 1, 1, 1]: all sinks of a sequence are there, or none
        k, v = torch.where(there, kept_k, k), torch.where(there, kept_v, v)
        return k, v, (far | there[:, 0]).expand(-1, -1, sinks)

    def _over_blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Softmax attention of every block, as if blocks were heads: [B, Hkv, n, rep * G, V].

        q [B, Hkv, n, rep * G, K], k and v [B, Hkv, n, C, .]; seen [1 or B, n, rep * G, C].
        """
        shape, mask = q.shape[1:3], seen[:, None].expand(-1, q.shape[1], -1, -1, -1)
        q, k, v = (part.flatten(1, 2) for part in (q, k, v))
        o = softmax_attention(
            q,
            k,
            v,
            scale=self.config.score_scale,
            cap=self.config.score_cap,
            mask=mask.flatten(1, 2),
        )
        return o.unflatten(1, shape)
