"""Softmax over positions that an earlier layer selected (TidalDecode, Yang et al. 2024)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.handed import hand_on, handed
from linspec.mixers.options import SpanOptions
from linspec.mixers.selecting import Selecting
from linspec.mixers.softmax import Softmax
from linspec.utils.options import option
from linspec.utils.sizes import check_size

# of the nodes of a step; pieces of a sequence have the number of tokens at their ends
_NODES = "positions of nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class TidalOptions(SpanOptions):
    """How much is selected, and by which layers of those that see all tokens, counted from 0."""

    budget: int = option("earlier positions that a layer reads", default=256, short=True)
    first: int = option("layer that selects; those before it read all tokens", default=2)
    again: int | None = option("layer that selects again; None is the middle one", default=None)
    selects: bool = option(
        "whether a layer reads all tokens and selects; first and again say it for all layers",
        default=True,
    )

    def __post_init__(self) -> None:
        check_size("budget", self.budget)
        check_size("first", self.first, least=0)
        if self.again is not None:
            check_size("again", self.again, least=0)


@MIXERS.register(
    "tidal",
    summary="softmax over the last groups and positions that two layers select for all later ones",
    paper="Yang et al. 2024 (TidalDecode), arXiv 2410.05076",
    state="2·T·d per KV head",
    cost="2·T·d per token where a layer selects, else 2·(n·G + budget)·d",
    options=TidalOptions,
)
class Tidal(Selecting):
    """A layer that selects is softmax; it hands on the positions before the span with the greatest scores.

    The score of a position is the greatest of the query heads that share its key; of equal scores that of the
    earlier position counts. Other layers read the positions that the nearest layer before them handed on.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        options = mixer.own_options(TidalOptions)
        self.budget, self.selects = options.budget, options.selects

    @classmethod
    def for_layers(cls, mixer: MixerConfig, config: StackConfig, count: int) -> list[MixerConfig]:
        options = mixer.own_options(TidalOptions)
        first = options.first
        again = max(first, count // 2) if options.again is None else options.again
        if not first <= again < count:
            raise ConfigError(
                f"mixer 'tidal' selects in layers first={first} and again={again} of {count} that see all "
                f"tokens; choose 0 <= first <= again <= {count - 1}"
            )
        if any(each.exact_heads for each in config.mixers):
            raise ConfigError(
                "mixer 'tidal' hands positions to the same KV heads of later layers, and this model has "
                "layers of 'by-head'; choose 'pages'"
            )
        return [
            _of_layer(mixer, again, selects=layer in (first, again))
            if layer >= first
            else MixerConfig()
            for layer in range(count)
        ]

    def attention_plan(self) -> AttentionPlan | None:
        return AttentionPlan(
            group=self.groups.size,
            span=self.groups.span,
            positions=self.budget,
            selects=self.selects,
        )

    # ---- what is selected

    def select(self, q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return _marked(self.best(q, keys, ends), keys.shape[2])

    def best(self, q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The selected rows [R, Hkv, 1, N, budget]; where there are fewer, others too, which are not seen."""
        scores = (q @ keys[:, :, None].mT).amax(2, keepdim=True)
        there = torch.arange(keys.shape[2], device=q.device) < ends[:, :, None]
        scores = scores.masked_fill(~there[:, None, None], float("-inf"))
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.budget]
        # kept until the last layer has read it
        return best.int()

    # ---- step form

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        if not self.selects:
            self._handed(_NODES)
            return super().attend(q, keys, values, tree_mask, sums)
        far = self.groups.masks(tree_mask)[1]
        found = None if far is None else super()._selected(q, keys, tree_mask, far)
        hand_on(_NODES, found)
        return Softmax.attend(self, q, keys, values, tree_mask, sums)

    def _selected(
        self, q: torch.Tensor, keys: torch.Tensor, tree_mask: TreeMask, far: torch.Tensor
    ) -> torch.Tensor:
        return self._handed(_NODES)

    def _handed(self, key: Hashable) -> torch.Tensor:
        found: torch.Tensor = handed(key, self.mixer.name)
        return found

    # ---- full form

    def over(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        assert mask is not None, "queries come with what they may see"
        time = mask.shape[1]
        if not self.selects:
            self._handed(time)
            return super().over(q, k, v, mask)
        ends = self.groups.ends(torch.arange(time - len(mask), time, device=q.device))
        nodes = q.unflatten(1, (self.kv_heads, self.repeats))
        before = k[:, :, : int(ends[-1])]
        hand_on(time, self.best(nodes, before, ends.expand(len(q), -1)))
        return Softmax.over(self, q, k, v, mask)

    def _found(
        self, q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor, time: int
    ) -> torch.Tensor:
        return _marked(self._handed(time), keys.shape[2])


def _of_layer(mixer: MixerConfig, again: int, *, selects: bool) -> MixerConfig:
    return replace(mixer, options={**mixer.options, "again": again, "selects": selects})


def _marked(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Which of `width` rows are named by `rows`: [.., N, M] -> [.., N, width]."""
    marks = torch.zeros(*rows.shape[:-1], width, dtype=torch.bool, device=rows.device)
    return marks.scatter_(-1, rows.long(), True)
