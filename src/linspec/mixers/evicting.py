"""Softmax over what is near, and over the rows of the past that queries have weighed most: caches that evict.

Groups that leave the span compete with the rows that were kept so far, and the best stay. What is kept
depends on the tokens and their positions: not on how they came, as a prompt, one by one or in a tree. So the
forms of the mixers agree, and speculation is lossless for the model that evicts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from linspec.errors import ConfigError
from linspec.kernels.cpu.evict import evict
from linspec.kernels.cpu.evict import why_not as why_not_in_kernels
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import MIXERS, Features, Rope
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.folding import FoldingMixer
from linspec.mixers.ops.exact import Exact, softmax_weights
from linspec.mixers.ops.kept_rows import pack_rows, row_columns, unpack_rows
from linspec.mixers.options import SpanOptions
from linspec.state.grouped import GroupedSpec
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictingOptions(SpanOptions):
    """How much is kept."""

    budget: int = option("tokens of earlier groups that are kept", default=1024, short=True)

    def __post_init__(self) -> None:
        check_size("budget", self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapOptions(EvictingOptions):
    """How much is kept, and who says what."""

    last: int = option("last queries of a closing group that are asked, at most all", default=32)
    pool: int = option("neighbours that share the greatest score, odd; at most all", default=7)

    def __post_init__(self) -> None:
        EvictingOptions.__post_init__(self)
        check_size("last", self.last)
        check_size("pool", self.pool)
        if self.pool % 2 == 0:
            raise ConfigError(
                f"pool must be odd, so that as many neighbours lie to both sides, got {self.pool}"
            )


class Evicting(FoldingMixer):
    """Base of the mixers that keep `budget` rows of the groups before the span, each KV head its own.

    Entries have the queries of their token beside the key, so that a group that closes can say what it looks
    for; within the span that is cheap. Its queries weigh the rows that were kept and the rows of their group
    up to their own, and `scores` makes of it who stays; of equal rows the earlier one does. Kept rows lie in
    the order of their positions, behind rows that are not there.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.budget = mixer.own_options(self.options_kind()).budget
        scale, cap = config.score_scale, config.score_cap
        self.exact = Exact(partial(softmax_weights, scale=scale, cap=cap))

    def options_kind(self) -> type[EvictingOptions]:
        return EvictingOptions

    def scores(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What rows [..., M, 2 K + 1] are worth, [..., M], as [..., rep, G, M] queries of a group weigh them.

        The last column of a row is what was returned for it when its group closed before, or 1 if it did not.
        """
        raise NotImplementedError

    # ---- state

    def sum_width(self) -> int:
        return self.budget

    def sum_columns(self) -> int:
        return row_columns(self.head_width)

    def state_spec(self) -> GroupedSpec:
        return replace(super().state_spec(), key_width=(1 + self.repeats) * self.head_width)

    def to_features(self, both: torch.Tensor, v: torch.Tensor, rope: Rope) -> Features:
        q, k, v = super().to_features(both, v, rope)
        asked = q.unflatten(-2, (self.kv_heads, self.repeats)).flatten(-2)
        return q, torch.cat((k, asked), dim=-1), v

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sums [..., S, Z] after one group of keys [..., G, K'] and values [..., G, V] has closed.

        In C where nodes of a step in one call decide it there too: of two rows that are nearly worth the
        same, both then keep the same one.
        """
        plan = self.attention_plan()
        if plan is None or why_not_in_kernels(sums, keys, values):
            return self.fold_by_torch(sums, keys, values)
        scale, cap = self.config.score_scale, self.config.score_cap
        return evict(plan, sums, keys, values, scale=scale, cap=cap)

    def fold_by_torch(
        self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """`fold` on any device and in any dtype, differentiable in keys and values."""
        keys, asked = (x.to(sums.dtype) for x in self._parted(keys))
        rows = torch.cat((sums, pack_rows(keys, values.to(sums.dtype))), dim=-2)
        scores = self._scores(rows.detach(), asked.detach())
        rows = torch.cat((rows[..., :-1], scores[..., None]), dim=-1)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.budget]
        order = best.sort(dim=-1).values[..., None]
        return rows.gather(-2, order.expand(*order.shape[:-1], rows.shape[-1]))

    def nothing_closed(self, k: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(k.dtype, torch.float32)
        return k.new_zeros(*k.shape[:2], self.budget, self.sum_columns(), dtype=wide)

    def _scores(self, rows: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """`scores` of kept rows and the group behind them with queries [..., G, rep K]; 0 without a row."""
        group, kept = asked.shape[-2], rows.shape[-2] - asked.shape[-2]
        keys, _, there = unpack_rows(rows)
        queries = asked.unflatten(-1, (self.repeats, -1)).transpose(-2, -3)
        causal = torch.ones(group, group, dtype=torch.bool, device=rows.device).tril()
        seen = there.mT & F.pad(causal, (kept, 0), value=True)
        weights = self.exact.weights(queries @ keys.mT.unsqueeze(-3), seen.unsqueeze(-3), None)
        return self.scores(rows, weights).masked_fill(~there[..., 0], 0.0)

    def _parted(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, and the queries beside them."""
        width = self.head_width
        return keys[..., :width], keys[..., width:]

    # ---- kernels

    def attention_plan(self) -> AttentionPlan | None:
        return None

    def evicting_plan(self, *, asked: int, pool: int = 0) -> AttentionPlan:
        """The plan of a kind that asks so many queries of a closing group, its last ones."""
        return AttentionPlan(
            group=self.groups.size,
            span=self.groups.span,
            budget=self.budget,
            asked=min(asked, self.groups.size),
            pool=pool,
        )

    # ---- reading

    def read(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        near: torch.Tensor,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        """Softmax over kept rows and entries: q [R, Hkv, rep, N, K], near [1 or R, 1, 1, N, C]."""
        k, v, there = unpack_rows(sums.to(q.dtype))
        kept = there.mT.unsqueeze(2).expand(-1, -1, -1, near.shape[3], -1)
        seen = torch.cat((kept, near.expand(*kept.shape[:-1], -1)), dim=-1)
        keys, values = torch.cat((k, self._parted(keys)[0]), dim=2), torch.cat((v, values), dim=2)
        return self.exact.nodes(q, keys, values, seen).unflatten(2, q.shape[2:4])


@MIXERS.register(
    "h2o",
    summary="softmax over the last groups and the earlier tokens weighed most in all (heavy hitters)",
    paper="Zhang et al. 2023 (H2O), arXiv 2306.14048",
    state="n·G·(2 + r)·d + budget·(2·d + 1) per KV head of r query heads",
    cost="2·(n·G + budget)·d + 2·(G + budget)·d per token",
    options=EvictingOptions,
)
class H2O(Evicting):
    """A row's score is the weight that it has received from the queries of its group and those behind it.

    The published form evicts one token with each new one, and every query says at once what it weighs. Here
    a group competes when it leaves the span, and its queries then weigh the rows that were kept by then and
    those of their own group.
    """

    def scores(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return rows[..., -1] + weights.sum((-3, -2))

    def attention_plan(self) -> AttentionPlan | None:
        return self.evicting_plan(asked=self.groups.size) if type(self) is H2O else None


@MIXERS.register(
    "snapkv",
    summary="softmax over the last groups and the earlier tokens that the last queries before them sought",
    paper="Li et al. 2024 (SnapKV), arXiv 2404.14469",
    state="n·G·(2 + r)·d + budget·(2·d + 1) per KV head of r query heads",
    cost="2·(n·G + budget)·d + 2·(G + budget)·d·last/G per token",
    options=SnapOptions,
)
class SnapKV(Evicting):
    """A row's score is what the last queries of the closing group weigh, the greatest among its neighbours.

    The published form selects once, with the last queries of a prompt, and keeps all that comes later. Here
    each group selects when it closes, from what earlier ones have left: where a prompt ends is nothing that
    the tokens say, so the same text would give other logits as a prompt and as an answer, and the state would
    grow with the answer. What an earlier group has dropped no later query can ask for. Neighbours are those
    in the order of the rows, so a kept row may have neighbours that once were far from it.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        options = mixer.own_options(SnapOptions)
        self.last, self.pool = options.last, options.pool

    def options_kind(self) -> type[EvictingOptions]:
        return SnapOptions

    def scores(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        weighed = weights[..., -self.last :, :].sum((-3, -2))
        pooled = F.max_pool1d(weighed[..., None, :].flatten(0, -3), self.pool, 1, self.pool // 2)
        return 1 + pooled[..., 0, :].unflatten(0, weighed.shape[:-1])

    def attention_plan(self) -> AttentionPlan | None:
        if type(self) is not SnapKV:
            return None
        return self.evicting_plan(asked=self.last, pool=self.pool)
