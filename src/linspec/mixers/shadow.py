"""Softmax over what is near and over selected chunks of the past, whose keys are rebuilt (ShadowKV)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from linspec.errors import ConfigError
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.folding import FoldingMixer
from linspec.mixers.ops.exact import softmax_attention
from linspec.mixers.ops.low_rank import factors, landmarks
from linspec.mixers.options import SpanOptions
from linspec.mixers.rope import Rotary, rotate
from linspec.mixers.rope_config import RopeConfig
from linspec.state.contract import LayerState, StateOptions
from linspec.state.shadow import Closed, Past, ShadowSpec, ShadowState
from linspec.utils.options import option
from linspec.utils.sizes import check_size

# of keys whose rank nobody says
RANK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowOptions(SpanOptions):
    """What is kept of a segment, and how much of all segments is read."""

    rank: int | None = option(
        "rank of the keys of a segment, over all KV heads of a layer. None is 32, or as much as they have",
        default=None,
    )
    budget: int = option("tokens of closed segments that a token reads", default=512, short=True)
    chunk: int = option("tokens that have a landmark together", default=8)
    outliers: int = option("chunks of a segment that are kept, and read, as they are", default=1)
    group: int | None = option("tokens of a segment", default=256)

    def __post_init__(self) -> None:
        check_size("chunk", self.chunk)
        if self.rank is not None:
            check_size("rank", self.rank)
        for name in ("budget", "outliers"):
            check_size(name, getattr(self, name), least=0)


@MIXERS.register(
    "shadow",
    summary="softmax over the last segments, outliers and selected chunks, with keys of low rank",
    paper="Sun et al. 2024 (ShadowKV), arXiv 2410.21465",
    state="n·G·3·d + T·(r/Hkv + r·d/G + d/c) per KV head, and T·d that can be offloaded",
    cost="2·(n·G + budget)·d + T/c·d + budget·r·d per token",
    options=ShadowOptions,
)
class Shadow(FoldingMixer):
    """A segment that leaves the span is factored, whole: its keys ahead of their rotation become low rank.

    A chunk's landmark is the mean of its rotated keys; the chunks of a segment that have a key most unlike
    their landmark are outliers. A query weighs landmarks by softmax and reads the chunks with most, and all
    outliers; query heads of one KV head read what one of them weighs most. Keys are rebuilt and rotated as
    they are read.

    The published form factors a prompt once, and adds what is generated to its exact tail. Here segments
    close by position, so that a prompt, its steps and a tree agree, and the exact tail does not grow.
    """

    keeps_cache = True
    offloads = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.options = mixer.own_options(ShadowOptions)
        most = min(self.kv_heads * self.head_width, mixer.group)
        self.rank = min(RANK, most) if self.options.rank is None else self.options.rank
        self._check(config, mixer.group, most)
        self.rope = config.rope if config.positions == "rope" else None
        self.scale = config.score_scale
        self.attention = partial(softmax_attention, scale=self.scale, cap=config.score_cap)

    def _check(self, config: StackConfig, group: int, most: int) -> None:
        options = self.options
        if group % options.chunk:
            raise ConfigError(
                f"a segment of group={group} tokens is not made of chunks of {options.chunk}; choose a "
                "divisor"
            )
        if self.rank > most:
            raise ConfigError(
                f"rank is {self.rank}, and the keys of a segment have at most {most}: {self.kv_heads} KV "
                f"heads of {self.head_width} features, {group} tokens; choose a smaller one"
            )
        if options.outliers > group // options.chunk:
            raise ConfigError(
                f"outliers is {options.outliers}, and a segment has {group // options.chunk} chunks; "
                "choose fewer"
            )
        if getattr(config, "layer_ropes", ()):
            raise ConfigError(
                "mixer 'shadow' rotates the keys that it rebuilds as all layers do, and layers of this model "
                "have rotary positions of their own; choose 'pages'"
            )

    # ---- state

    def entry_gates(self, k: torch.Tensor) -> torch.Tensor:
        # keys ahead of their rotation, whose rank is low
        return k

    def state_spec(self) -> ShadowSpec:
        return ShadowSpec(
            kv_heads=self.kv_heads,
            key_width=2 * self.head_width,
            value_width=self.head_width,
            conv_history=max(0, self.mixer.taps - 1),
            group=self.mixer.group,
            span=self.mixer.span,
            rank=self.rank,
            chunk=self.options.chunk,
            outliers=self.options.outliers,
            head_width=self.head_width,
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        return ShadowState(self.state_spec(), [each.fold for each in layers], slots, options)

    def nothing_closed(self, k: torch.Tensor) -> tuple[Past, ...]:
        return (Past(self.state_spec()),) * len(k)

    def closed_group(
        self, sums: tuple[Past, ...], keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[Past, ...]:
        return tuple(map(self.fold, sums, keys, values))

    def fold(self, sums: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """The past after a segment of keys [Hkv, S, 2 K] and values [Hkv, S, V]."""
        chunk, width = self.options.chunk, self.head_width
        # wherever they lie, so that equal entries become equal bits
        keys, values = keys.contiguous(), values.contiguous()
        turned, plain = keys[..., :width], keys[..., width:]
        left, right = factors(plain, self.rank)
        chunks, kept = (x.unflatten(1, (-1, chunk)) for x in (turned, values))
        means, likeness = landmarks(chunks)
        odd = likeness.sort(dim=-1, stable=True).indices[:, : self.options.outliers]
        heads = torch.arange(len(keys), device=keys.device)[:, None]
        return sums.closed(
            Closed(
                left=left,
                right=right,
                landmarks=means,
                outliers=odd,
                outlier_keys=chunks[heads, odd],
                outlier_values=kept[heads, odd],
                values=kept,
            )
        )

    # ---- kernels

    def attention_plan(self) -> AttentionPlan | None:
        if type(self) is not Shadow:
            return None
        options = self.options
        return AttentionPlan(
            group=self.groups.size,
            span=self.groups.span,
            rank=self.rank,
            chunk=options.chunk,
            outliers=options.outliers,
            marked=options.budget // options.chunk,
        )

    # ---- reading

    def read(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        near: torch.Tensor,
        sums: tuple[Past, ...],
    ) -> torch.Tensor:
        keys, near = keys[..., : self.head_width], near.expand(len(q), -1, -1, -1, -1)
        one_by_one = zip(q, keys, values, near[:, 0, 0], sums, strict=True)
        return torch.stack([self._read_one(*each) for each in one_by_one])

    def _read_one(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        near: torch.Tensor,
        past: Past,
    ) -> torch.Tensor:
        """What nodes q [Hkv, rep, N, K] of one sequence read: [Hkv, rep, N, V]; near [N, C]."""
        seen = near.expand(len(q), -1, -1)
        if past.segments:
            marks = self.select(q, past)
            used = marks.any(1)
            # of a KV head those that a node reads come first, in their order
            order = used.int().sort(dim=-1, descending=True, stable=True).indices
            chunks = order[:, : int(used.sum(-1).max())]
            fetched = past.fetch(chunks, values.dtype)
            rebuilt = self.rebuilt(past, chunks, keys.dtype)
            odd_keys, odd_values = (
                past.of(name, self.head_width, keys.dtype).flatten(1, 2)
                for name in ("outlier_keys", "outlier_values")
            )
            chosen = marks.gather(-1, chunks[:, None].expand(-1, marks.shape[1], -1))
            chosen = chosen.repeat_interleave(self.options.chunk, -1)
            always = chosen.new_ones(*seen.shape[:2], odd_keys.shape[1])
            seen = torch.cat((seen, always, chosen), -1)
            keys = torch.cat((keys, odd_keys, rebuilt), 1)
            values = torch.cat((values, odd_values, fetched.values().flatten(1, 2)), 1)
        mask = seen.repeat_interleave(q.shape[1], 0)
        out = self.attention(q.flatten(0, 1)[None], keys[None], values[None], mask=mask[None])
        return out[0].unflatten(0, q.shape[:2])

    def select(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        """Which chunks of the past nodes q [Hkv, rep, N, K] read, outliers apart: [Hkv, N, chunks]."""
        marks = torch.arange(past.chunks, device=q.device)
        others = (marks[:, None] != past.outliers[:, None]).all(-1)
        count = min(self.options.budget // self.options.chunk, int(others[0].sum()))
        shares = self._shares(q, past.of("landmarks", self.head_width, q.dtype), others)
        best = shares.topk(count, dim=-1).indices
        return torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, best, True)

    def _shares(self, q: torch.Tensor, means: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Logarithm of the greatest share of each landmark among query heads: [Hkv, N, chunks]."""
        products = (q.detach() @ means.detach()[:, None].mT) * self.scale
        scores = products.masked_fill(~others[:, None, None], float("-inf"))
        # a landmark that is not there has none; where none is, nobody asks
        return scores.log_softmax(-1).amax(1)

    def rebuilt(self, past: Past, chunks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rotated keys [Hkv, M c, K] of `chunks` [Hkv, M]."""
        spec = past.spec
        heads = torch.arange(len(chunks), device=chunks.device)[:, None]
        if 2 * chunks.shape[1] >= past.chunks:
            # most are asked for: one product for each segment
            left = past.of("left", spec.rank, dtype).unflatten(0, (past.segments, 1, -1))
            keys = left @ past.of("right", self.head_width, dtype)
            keys = keys.transpose(0, 1).unflatten(2, (-1, spec.chunk)).flatten(1, 2)[heads, chunks]
        else:
            rows = chunks[..., None] * spec.chunk + torch.arange(spec.chunk, device=chunks.device)
            right = past.of("right", self.head_width, dtype, (chunks // spec.chunks, heads))
            keys = past.of("left", spec.rank, dtype, rows) @ right
        if self.rope is None:
            return keys.flatten(1, 2)
        cos, sin = _turning(
            self.rope, self.head_width, past.chunks * spec.chunk, dtype, keys.device
        )
        cos, sin = (x.unflatten(0, (-1, spec.chunk))[chunks] for x in (cos, sin))
        return rotate(keys, cos, sin).flatten(1, 2)


def _turning(
    rope: RopeConfig, width: int, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary factors [T, R] of the first `count` positions, a multiple of which the table has."""
    cos, sin = _table(rope, width, 1 << (count - 1).bit_length(), dtype, device)
    return cos[:count], sin[:count]


# all layers have one
@lru_cache(maxsize=2)
def _table(
    rope: RopeConfig, width: int, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        cos, sin = Rotary(rope, width)(torch.arange(count, device=device), dtype)
        return cos[:, 0], sin[:, 0]
