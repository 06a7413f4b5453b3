"""Attention to the pages of the past that hold what a query looks for (Quest, Tang et al. 2024; LServe)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linspec.errors import ConfigError
from linspec.kernels.step_plan import JUDGED, AttentionPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.options import SpanOptions
from linspec.mixers.selecting import Selecting
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesOptions(SpanOptions):
    """Which pages are read, and how they are judged."""

    budget: int = option("tokens of earlier groups that a token reads", default=1024, short=True)
    page: int | None = option(
        "tokens that are judged together; a group is read whole. None is 16", default=None
    )

    def __post_init__(self) -> None:
        check_size("budget", self.budget)
        if self.page is not None:
            check_size("page", self.page)


@MIXERS.register(
    "pages",
    summary="softmax over the last groups and those earlier ones that may hold what a query looks for",
    paper="Tang et al. 2024 (Quest), arXiv 2406.10774; Yang et al. 2025 (LServe), arXiv 2502.14866",
    state="2·T·d per KV head",
    cost="2·(n·G + budget)·d + 2·T/page·d per token",
    options=PagesOptions,
)
class Pages(Selecting):
    """Groups are judged by the bounds of their pages: no key of a page has a greater product with the query.

    The bound of a page with greatest and least keys k⁺ and k⁻ is the sum of max(qᵢ k⁺ᵢ, qᵢ k⁻ᵢ), with 8
    significant bits of either, rounded outwards. A group has the greatest bound of its pages and of the query
    heads that share it.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        options = mixer.own_options(PagesOptions)
        self.page = options.page or math.gcd(JUDGED, mixer.group)
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
        )

    def select(self, q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        size = self.groups.size
        bounds = self.bounds(q, keys).unflatten(-1, (-1, size // self.page)).amax(-1).amax(2)
        there = torch.arange(bounds.shape[-1], device=q.device) < ends[:, :, None] // size
        bounds = bounds.masked_fill(~there[:, None], float("-inf"))
        # of equal bounds that of the earlier group
        best = bounds.sort(dim=-1, descending=True, stable=True).indices[..., : self.chosen_groups]
        chosen = torch.zeros_like(bounds, dtype=torch.bool).scatter_(-1, best, True)
        return chosen.repeat_interleave(size, -1)[:, :, None]

    def bounds(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The greatest product of each query that a key of each page can have: [R, Hkv, rep, N, pages]."""
        pages = keys.unflatten(2, (-1, self.page))
        greatest, least = rounded_out(pages.amax(3), pages.amin(3))
        return F.relu(q) @ greatest[:, :, None].mT - F.relu(-q) @ least[:, :, None].mT


def rounded_out(greatest: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As bfloat16 has them, away from each other: half the memory, and bounds as before."""
    return _away(greatest, above=True), _away(least, above=False)


def _away(x: torch.Tensor, *, above: bool) -> torch.Tensor:
    bits = x.detach().float().contiguous().view(torch.int32)
    # a larger magnitude lies further above for numbers without sign, and further below for others
    larger = ((bits >= 0) == above).int()
    return ((bits + 0xFFFF * larger) & ~0xFFFF).view(torch.float32).to(x.dtype)
