"""Linear attention over groups: exact for the last few groups, a running sum over the groups before.

t sees exactly the tokens within its span, and S_t sums φ(k_s) v_sᵀ over all groups before that (float32). A
linear mixer is an exact part, a summed part, and how the two become an output. A kernel other than the
mixer's own puts it in the *grouped arrangement*: the kernel's weights within the span, plus α times what the
mixer makes of the closed groups alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.step_plan import AttentionPlan, SummedPlan
from linspec.mixers.arranged import arranged_exact
from linspec.mixers.carry import Carry
from linspec.mixers.closing import ClosingMixer
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.blocks import join
from linspec.mixers.ops.decayed import Decayed
from linspec.mixers.ops.exact import Exact, relu_squared
from linspec.mixers.ops.features import unit
from linspec.mixers.ops.parts import Parts, weigh_features
from linspec.mixers.ops.summed import Summed
from linspec.state.grouped import GroupedSpec


class LinearMixer(ClosingMixer):
    """Base of the linear mixers. What is a mixer's own:

    feature_map: φ of queries and keys alike. own_exact: its own weights within the span. make_summed: the
    part over closed groups, if there is one. sum_scale: the factor on that. finish: the last touch, such as
    a denominator. keeps_features: entries are features already, which are no wider than keys.
    """

    keeps_features: ClassVar[bool] = True
    static_step = True
    summed: Summed | Decayed | None

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.arranged = mixer.kernel != "own"
        self.maps_early = self.keeps_features and not self.arranged
        self.summed = self.make_summed()
        exact = arranged_exact(config, mixer) if self.arranged else self.own_exact()
        self.parts = Parts(self.groups, exact, self.summed)
        if self.arranged and self.summed is not None:
            # α = 0 at the start: with α = 1 the unnormalized sum drowns the exact part (You et al.
            # 2024, fig. 6b)
            self.alpha = nn.Parameter(torch.zeros(()))

    # ---- what a linear mixer defines

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """φ of queries and keys alike: [..., K] -> [..., S]."""
        return unit(x)

    def summed_queries(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become before they read the sums: [.., Hkv, rep, N, K'] -> [.., S]."""
        return self.feature_map(q)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        """What keys become when their group closes into a sum: [.., Hkv, C, K'] -> [.., Hkv, C, S]."""
        return self.feature_map(k)

    def sum_width(self) -> int:
        """S, how many features keys have in the sums."""
        return self.head_width

    def own_exact(self) -> Exact | None:
        """The mixer's own weights within the span: relu² of products of its features."""
        return weigh_features(self.summed, relu_squared)

    def make_summed(self) -> Summed | Decayed | None:
        """The part over closed groups; None where they are forgotten."""
        if self.maps_early:
            return Summed(self.groups)
        return Summed(self.groups, self.summed_queries, self.summed_keys)

    def sum_scale(self) -> torch.Tensor | float:
        """Factor on what closed groups give."""
        return self.alpha if self.arranged else 1.0

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        """Last touch on weighted sums of values [..., V'] -> [..., V], such as a denominator."""
        return o

    # ---- what follows from it

    def summed_plan(self, map_: str, exact: str, **given: Any) -> SummedPlan:
        """The step form as kernels know it, from the mixer's own feature map, weights and end."""
        mixer, own = self.mixer, not self.arranged
        return SummedPlan(
            group=mixer.group,
            span=mixer.span,
            features=self.sum_width(),
            map=map_,
            mapped=self.maps_early,
            exact=exact if own else mixer.kernel,
            alpha=float(self.sum_scale()),
            together=own,
            bias=self.planned_bias(),
            **given,
        )

    def grouped_plan(self, alpha: float) -> AttentionPlan | SummedPlan:
        """The step form of weights within the span and unit features in the sums, as kernels know it."""
        mixer = self.mixer
        # of unit keys: those of another kernel are made late
        given: dict[str, Any] = {"group": mixer.group, "span": mixer.span, "alpha": alpha}
        given["bias"] = self.planned_bias()
        if mixer.kernel != "relu2":
            return AttentionPlan(squared_relu=mixer.kernel == "own", **given)
        width = self.head_width
        return SummedPlan(map="unit", features=width, exact="relu2", together=False, **given)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.feature_map(x) if self.maps_early else x

    def state_spec(self) -> GroupedSpec:
        spec = super().state_spec()
        return spec if self.summed is not None else replace(spec, sum_width=0)

    def carry(self) -> Carry:
        return Carry(self.mixer.group, self.mixer.span, self.summed)

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        assert self.summed is not None, "nothing is folded where nothing is summed"
        return self.summed.fold(sums, keys, values)

    def combine(self, exact: torch.Tensor | None, summed: torch.Tensor | None) -> torch.Tensor:
        """Outputs [..., V] from the value sums [..., V'] of both parts, one of which may not be there."""
        if exact is None or summed is None:
            both = self.sum_scale() * summed if summed is not None else exact
        elif self.arranged:
            return exact[..., : self.head_width] + self.sum_scale() * self.finish(summed)
        else:
            both = exact + self.sum_scale() * summed
        assert both is not None
        return self.finish(both)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        bias = None
        if self.relative is not None:
            bias = self.relative.nodes(tree_mask, self.kv_heads)
        parts = self.parts.nodes(q, keys, values, tree_mask, sums, bias)
        return self.combine(*parts).unflatten(2, q.shape[2:4])

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        bias = None
        if self.relative is not None:
            bias = self.relative.blocks(self.groups, q.shape[2], self.kv_heads)
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        parts = self.parts.blocks(heads, k, v, sums, bias)
        return join(self.combine(*parts), self.repeats, q.shape[2])

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Every token sees span - 1 groups to either side exactly, and the others as a sum."""
        bias = None
        if self.relative is not None:
            bias = self.relative.blocks_both(self.groups, self.kv_heads)
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        parts = self.parts.blocks_both(heads, k, v, real, bias)
        return join(self.combine(*parts), self.repeats, q.shape[2])
