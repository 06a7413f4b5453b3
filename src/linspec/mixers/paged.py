"""Attention to the pages of the past that hold what a query looks for (Quest, Tang et al. 2024; LServe)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linspec.errors import ConfigError
from linspec.kernels.step_plan import JUDGED, PAGE, AttentionPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.options import SpanOptions
from linspec.mixers.selecting import Selecting
from linspec.quantization.two_bit import products, rounded_out
from linspec.utils.messages import shown
from linspec.utils.options import option
from linspec.utils.sizes import check_size

# what groups can be judged by, and the tokens that are judged together unless an option says it
JUDGES = {"codes": PAGE, "bounds": JUDGED}
# features of queries, for all pages that are judged at once
_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesOptions(SpanOptions):
    """Which pages are read, and how they are judged."""

    budget: int = option("tokens of earlier groups that a token reads", default=1024, short=True)
    judge: str = option(
        "what groups are judged by: codes (keys in two bits) or bounds (Quest's)", default="codes"
    )
    page: int | None = option(
        "tokens that are judged together; a group is read whole. None is 64 by codes, 16 by bounds",
        default=None,
    )

    def __post_init__(self) -> None:
        check_size("budget", self.budget)
        check_judge(self.judge)
        if self.page is not None:
            check_size("page", self.page)


def check_judge(judge: str) -> None:
    """Raise ConfigError for what groups cannot be judged by."""
    if judge not in JUDGES:
        raise ConfigError(f"judge is one of {', '.join(JUDGES)}, got {shown(repr(judge))}")


@MIXERS.register(
    "pages",
    summary="softmax over the last groups and those earlier ones that may hold what a query looks for",
    paper="Tang et al. 2024 (Quest), arXiv 2406.10774; Yang et al. 2025 (LServe), arXiv 2502.14866",
    state="2·T·d per KV head",
    cost="2·(n·G + budget)·d + 2·T/page·d per token",
    options=PagesOptions,
)
class Pages(Selecting):
    """A group has what the best of its pages has for the best of the query heads that share it.

    By *codes* a page has the greatest product of the query with one of its keys in two bits, see
    quantization/two_bit.py. By *bounds* it has more than a product with any of its keys: with greatest and
    least keys k⁺ and k⁻ the sum of max(qᵢ k⁺ᵢ, qᵢ k⁻ᵢ), with 8 significant bits of either, rounded outwards.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        options = mixer.own_options(PagesOptions)
        self.coded = options.judge == "codes"
        self.page = options.page or math.gcd(JUDGES[options.judge], mixer.group)
        if mixer.group % self.page:
            raise ConfigError(
                f"a group of {mixer.group} tokens is not made of pages of {self.page}; choose a divisor"
            )
        self.chosen_groups = max(1, options.budget // mixer.group)

    def attention_plan(self) -> AttentionPlan | None:
        return AttentionPlan(
            group=self.groups.size,
            span=self.groups.span,
            chosen=self.chosen_groups,
            judged=self.page,
            coded=self.coded,
        )

    def select(self, q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        size = self.groups.size
        judged = self.coded_products(q, keys) if self.coded else self.bounds(q, keys)
        judged = judged.unflatten(-1, (-1, size // self.page)).amax(-1).amax(2)
        there = torch.arange(judged.shape[-1], device=q.device) < ends[:, :, None] // size
        judged = judged.masked_fill(~there[:, None], float("-inf"))
        # of equal ones the earlier group
        best = judged.sort(dim=-1, descending=True, stable=True).indices[..., : self.chosen_groups]
        chosen = torch.zeros_like(judged, dtype=torch.bool).scatter_(-1, best, True)
        return chosen.repeat_interleave(size, -1)[:, :, None]

    def bounds(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The greatest product of each query that a key of each page can have: [R, Hkv, rep, N, pages]."""
        pages = keys.unflatten(2, (-1, self.page))
        greatest, least = rounded_out(pages.amax(3), pages.amin(3))
        return F.relu(q) @ greatest[:, :, None].mT - F.relu(-q) @ least[:, :, None].mT

    def coded_products(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The greatest product of each query with a key of each page in two bits: [R, Hkv, rep, N, pages]."""
        pages = keys.unflatten(2, (-1, self.page))
        queries = q.flatten(2, 3)[:, :, None]
        found = [
            products(queries, some)
            for some in pages.split(max(1, _AT_ONCE // queries.numel()), dim=2)
        ]
        return torch.cat(found, dim=2).mT.unflatten(2, q.shape[2:4])
